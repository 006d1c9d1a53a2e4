"""Finds runs and scores that are not resumed because the images have changed or were identified in another way."""

from collections.abc import Callable, Iterator

from lth_diet.config.run_ids import run_name, scores_id
from lth_diet.config.schema import Config
from lth_diet.data import catalog
from lth_diet.runs.run_store import RunStore, open_run_store


def warnings(config: Config) -> list[str]:
    """Return one sentence for each run and set of scores that only differ from this configuration's in their images.

    They were made with an earlier state of the image folder that is in the cache, or by a version that identified
    images by name and size. Once training on today's images has started, nothing is returned.
    """
    if config.dataset.name != "image_folder":
        return []
    sentences = list(_find(config, run_name, "replicate_*"))
    if config.needs_scores and config.scores.file is None:
        sentences += _find(config, lambda *arguments: f"scores/{scores_id(*arguments)}", "network_*")
    return sentences


def _find(config: Config, name: Callable[[Config, str], str], parts: str) -> Iterator[str]:
    root, runs = config.dataset.root, open_run_store(config.runs)
    info = catalog.info(config.dataset.name, root)
    new = runs / name(config, info.fingerprint)
    if any(new.path.glob(parts)):
        return
    old = runs / name(config, info.old_fingerprint)
    if _exists(old):
        yield (
            f"{old} was made by a version that identified images by name and size, and is not resumed: this version "
            f"identifies them by content and starts {new}; {_remedy(old)}"
        )
    for fingerprint in catalog.cached_fingerprints():
        old = runs / name(config, fingerprint)
        if fingerprint != info.fingerprint and _exists(old):
            changes = catalog.changes_since(fingerprint, root)
            if changes:
                yield (
                    f"the images in {root} are not those of {old}: {changes}; this changes the run id and starts "
                    f"{new}, unless they are restored"
                )


def _exists(folder: RunStore) -> bool:
    folder.refresh_index()
    return (folder.path / "config.json").exists()


def _remedy(old: RunStore) -> str:
    if (old.path / "manifest.json").exists():
        pull = "pull its folder with `python -m lth_diet pull` and " if old.is_remote else ""
        return f"{pull}set scores.file={old.path / 'scores.safetensors'} to use its scores"
    return "resume it with the version that made it, or let this one start again"
