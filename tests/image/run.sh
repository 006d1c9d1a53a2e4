#!/usr/bin/env bash
# make image-test: builds the image of the Dockerfile and runs the experiment in it, also compiled, without a Docker engine.
#
# As root on Debian, with: apt-get install buildah crun uidmap debootstrap. Takes 30 GB and some minutes.
# Where the base image cannot be pulled, an image of the same name is made from Debian's own packages.
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
clean() {
    rm -rf "$work"
    if [ -n "${container:-}" ]; then buildah rm "$container" > /dev/null; fi
}
trap clean EXIT
export BUILDAH_ISOLATION=chroot

base=$(sed -n 's/^FROM //p' Dockerfile)
echo "base image: $base"
if ! buildah pull -q --policy always "docker.io/library/$base" 2> /dev/null; then
    echo "cannot be pulled; made with debootstrap: Debian bookworm with its own Python"
    debootstrap --variant=minbase --include=python3,python3-dev,python3-pip,python3-venv,ca-certificates bookworm "$work/root" > "$work/log"
    rm -f "$work/root"/usr/lib/python3*/EXTERNALLY-MANAGED
    ln -s python3 "$work/root/usr/bin/python"
    for file in /etc/pip.conf /etc/ssl/certs/ca-certificates.crt; do # how this machine reaches its package index
        if [ -e "$file" ]; then cp "$file" "$work/root$file"; fi
    done
    container=$(buildah from scratch)
    buildah add -q "$container" "$work/root" / > /dev/null
    buildah commit -q "$container" "docker.io/library/$base" > /dev/null
    buildah rm "$container" > /dev/null
    container=
    rm -rf "$work/root"
fi

begin=$SECONDS
buildah bud -q --build-arg "GIT_COMMIT=$(git rev-parse HEAD)" -t lth_diet . > "$work/id"
echo "built in $((SECONDS - begin)) s"

container=$(buildah from lth_diet)
command=(recipes/imp.py -f yamls/digits_init.yaml prune.levels=2)
begin=$SECONDS
buildah run --user 1000:1000 "$container" -- composer -n 2 "${command[@]}" | tee "$work/image"
echo "trained in $((SECONDS - begin)) s, as user 1000"
begin=$SECONDS
compiled=(yamls/digits_init.yaml compile=true replicates=1 stack=1 prune.levels=0 train.steps=10 train.milestones=[])
buildah run --user 1000:1000 "$container" -- composer -n 1 recipes/imp.py -f "${compiled[@]}"
buildah run "$container" -- ls data/cache/compiled | grep -q . && echo "compiled in $((SECONDS - begin)) s"

MLFLOW_TRACKING_URI="sqlite:///$work/mlflow.db" .venv/bin/composer -n 2 "${command[@]}" "runs=$work/runs" > "$work/host"
table() { sed -n '/^level /,/^compare/p' "$1" | grep -v '^compare'; }
diff <(table "$work/image") <(table "$work/host") && echo "the same numbers as on the host"
