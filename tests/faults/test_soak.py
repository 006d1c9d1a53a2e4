"""Memory, open files and time per level do not grow over many levels in one process."""

import functools
import gc
import os

import pandas as pd
import psutil
import pytest
import torch

from lth_diet import imp
from lth_diet.config import loading
from lth_diet.launch.tracker import Tracker
from lth_diet.runs.run_directory import RunDirectory
from lth_diet.tracking import sync
from lth_diet.training.progress import Progress

LEVELS = 200 if "KILLS" in os.environ else 60  # 200 in `make faults`
SETTLED = 20
"""Levels until caches and heap have their size."""
SMALL = ["train.steps=3", "train.milestones=[2]", "pretrain.steps=1", "model.width=1", "prune.fraction=0.01"]
SMALL += [f"prune.levels={LEVELS - 1}", "intervals.checkpoint=2", "intervals.log=1"]


# MLflow keeps what writes the artifacts of the last 1,024 runs: 34 objects each
@pytest.mark.integration
@pytest.mark.parametrize(("sync", "objects", "mebibytes"), [(None, 2, 5), (sync.sync_replicate, 50, 30)])
def test_memory_open_files_and_time_per_level_do_not_grow(tiny, sync, objects, mebibytes):
    run = RunDirectory(loading.load_config(tiny(), SMALL))
    run.create()
    torch.set_num_threads(run.config.threads)
    replicate, progress, process, rows = run.replicate(0), Progress(["replicate_0"], 0), psutil.Process(), []
    send = Tracker(functools.partial(sync, replicate), run.path.parent, progress) if sync else lambda: None

    def track():
        send()
        if replicate.level(len(rows)).done:
            seconds = sum(process.cpu_times()[:2])
            if len(rows) % SETTLED == SETTLED - 1:
                gc.collect()
            counts = {"objects": len(gc.get_objects()), "open files": process.num_fds()}
            rows.append({"MiB": process.memory_info().rss / 2**20, "CPU seconds": seconds, **counts})

    imp.IMP(run.config, [replicate], progress, track).run()
    levels = pd.DataFrame(rows, index=range(1, len(rows) + 1))
    levels["CPU seconds"] = levels["CPU seconds"].diff().rolling(10).median()
    print(levels.loc[[1, SETTLED, LEVELS // 2, LEVELS]].to_string())
    grown = levels.loc[LEVELS] - levels.loc[SETTLED]
    assert len(levels) == LEVELS and not progress.messages
    assert grown["open files"] <= 0
    assert grown["objects"] < objects * (LEVELS - SETTLED)
    assert grown["MiB"] < mebibytes
    assert levels["CPU seconds"][LEVELS] < 3 * levels["CPU seconds"][SETTLED]
