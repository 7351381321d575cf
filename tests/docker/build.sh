#!/usr/bin/env bash
# Build the image for CPUs, then run what it is for in it, as users should: another user than root, a read-only root,
# no network, a volume at /data. Ends with 0 if every check passed. Needs docker or podman, python3 and pip.
#
#   ENGINE    docker or podman. Default: docker if its daemon answers, else podman.
#   BASE      what to build on. Default: python:3.11-slim; if it cannot be had, Debian's Python 3.11 by debootstrap (as root).
#   TAG       the image's name. Default: latentprep:cpu
#   EXTRAS, TORCH_INDEX    the Dockerfile's arguments.
#
# Packages come from where your pip gets them: `pip config list` goes into the build, as a secret that stays out of the
# image. Folders and certificates that it names are mounted; docker cannot do that, so there they must be at URLs.
set -euo pipefail
cd "$(dirname "$0")/../.."

TAG=${TAG:-latentprep:cpu}
BASE=${BASE:-docker.io/library/python:3.11-slim}
TORCH_INDEX=${TORCH_INDEX-https://download.pytorch.org/whl/cpu}
if [ -z "${ENGINE:-}" ]; then
    if docker info >/dev/null 2>&1; then ENGINE=docker; else ENGINE=podman; fi
fi
command -v "$ENGINE" >/dev/null || { echo "error: neither docker nor podman is here"; exit 2; }
scratch=$(mktemp -d)
volume=latentprep-check-$$
box=$volume
trap '"$ENGINE" rm --force "$box" >/dev/null 2>&1; "$ENGINE" volume rm --force "$volume" >/dev/null 2>&1; rm -rf "$scratch"' EXIT

say() { printf '\n== %s\n' "$*"; }
fail() { printf 'FAILED: %s\n' "$*"; exit 1; }

# --- build

debian_base() { # Debian's Python as an image, without what images leave out, and with the names that python:slim has
    local root=$scratch/root
    debootstrap --variant=minbase --include=python3,python3-pip,python3-venv,ca-certificates bookworm "$root" >"$scratch/log" ||
        { tail "$scratch/log"; fail "debootstrap"; }
    rm -rf "$root"/usr/share/{doc,locale,man}/* "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/*
    ln -s python3 "$root/usr/bin/python"
    tar -C "$root" -c . | "$ENGINE" import - localhost/latentprep-base >/dev/null
    rm -rf "$root"
}

if ! "$ENGINE" image inspect "$BASE" >/dev/null 2>&1 && ! timeout 300 "$ENGINE" pull --quiet "$BASE"; then
    say "$BASE cannot be had: making a base with debootstrap"
    BASE=localhost/latentprep-base
    "$ENGINE" image inspect "$BASE" >/dev/null 2>&1 || debian_base
fi
if [ -n "$TORCH_INDEX" ] && ! python3 -c "import urllib.request as r; r.urlopen('$TORCH_INDEX/torch/', timeout=20)" 2>/dev/null; then
    say "$TORCH_INDEX cannot be reached: torch comes from where your pip gets it"
    TORCH_INDEX=
fi

# pip's settings as one file, and what it names on this machine
python3 -m pip config list | python3 -c '
import ast, pathlib, re, sys
settings = {}
for line in sys.stdin:
    name, _, value = line.strip().partition("=")
    settings[name.rpartition(".")[2]] = ast.literal_eval(value).split()
known = "index-url extra-index-url find-links no-index trusted-host proxy cert constraint timeout".split()
folder = pathlib.Path(sys.argv[1])
kept = {name: words for name, words in settings.items() if name in known}
(folder / "pip.conf").write_text("[global]\n" + "".join(f"{name} = {chr(32).join(words)}\n" for name, words in kept.items()))
paths = {word for words in kept.values() for word in words if word.startswith("/")}
paths |= {str(pathlib.Path(word[7:]).parent) for words in kept.values() for word in words if word.startswith("file://")}  # the files lie beside it
(folder / "mounts").write_text("".join(f"{path}\n" for path in sorted(paths)))
' "$scratch"
arguments=(--build-arg "BASE=$BASE" --build-arg "TORCH_INDEX=$TORCH_INDEX" --secret "id=pip.conf,src=$scratch/pip.conf")
[ -z "${EXTRAS+given}" ] || arguments+=(--build-arg "EXTRAS=$EXTRAS")
while read -r path; do
    if [ "$ENGINE" = podman ]; then arguments+=(--volume "$path:$path:ro"); else echo "warning: a build by docker cannot see $path"; fi
done <"$scratch/mounts"

say "building $TAG on $BASE"
start=$SECONDS
"$ENGINE" build --network host "${arguments[@]}" --tag "$TAG" . >"$scratch/log" 2>&1 || { tail -n 40 "$scratch/log"; fail "the build"; }
size() { "$ENGINE" image inspect --format '{{.Size}}' "$1"; }
printf 'built in %d s: %d MB, of which the base has %d\n' $((SECONDS - start)) $(($(size "$TAG") / 1000000)) $(($(size "$BASE") / 1000000))

# --- check

options=(--read-only --network none --env OMP_NUM_THREADS=1 --volume "$volume:/data")
[ "$ENGINE" = docker ] || options+=(--read-only-tmpfs=false) # as docker does it: nothing but /data can be written to
run() { "$ENGINE" run --rm "${options[@]}" "$TAG" "$@"; }
checksums() { run sh -c "cd $1 && find . -type f ! -name .lock | LC_ALL=C sort | xargs sha256sum"; }

code() { (cd "$1" && find latentprep latenttrain -name "*.py" | LC_ALL=C sort | xargs sha256sum); }

check() { # check TEXT COMMAND…
    local text=$1
    shift
    "$@" >"$scratch/log" 2>&1 || { tail -n 20 "$scratch/log"; fail "$text"; }
    echo "ok  $text"
}

# stopped FILE HINT COMMAND…: SIGTERM to the command once FILE is there; then it says HINT and exits as for Ctrl-C
stopped() {
    local file=$1 hint=$2 code
    shift 2
    "$ENGINE" run --detach --name "$box" "${options[@]}" "$TAG" "$@"
    for ((i = 0; i < 1200; i++)); do
        ! "$ENGINE" exec "$box" sh -c "ls $file" >/dev/null 2>&1 || break
        sleep 0.1
    done
    "$ENGINE" exec "$box" cat /proc/1/cmdline | tr '\0' ' ' | grep -- "$*" || fail "$1 is not process 1, which gets the signals"
    start=$SECONDS
    "$ENGINE" kill --signal TERM "$box"
    code=$("$ENGINE" wait "$box")
    "$ENGINE" logs "$box" >"$scratch/said" 2>&1
    "$ENGINE" rm "$box"
    cat "$scratch/said"
    [ "$code" = 143 ] && grep "$hint" "$scratch/said" && ((SECONDS - start < 10)) # docker stop kills after 10 s
}
same() { # same FOLDER FOLDER NAME: files whose names hold NAME
    local sums
    sums=$(checksums "$1" | grep "$3") && [ "$sums" = "$(checksums "$2" | grep "$3")" ]
}

encode=(latentprep encode shapes --codec dct --shard-rows 200)
fit=(latenttrain fit whole --width 0.25 --limit 400 --epochs 20 --resume)
say "user 1000, a read-only root, no network, a volume at /data"
check "it holds the code that is here" [ "$(code .)" = "$(run sh -c "$(declare -f code); code /opt/venv/lib/python3.*/site-packages")" ]
check "the image itself shows help" run
for program in latentprep latenttrain; do
    check "$program --version" run $program --version
    check "$program --help" run $program --help
done
check "torch is without CUDA" run python -c "import torch; assert torch.version.cuda is None, torch.__version__"
check "the user is not root" [ "$(run id -u)" = 1000 ]
check "nothing but /data can be written to" run sh -c '! touch /opt/x /tmp/x'
check "encode" run "${encode[@]}" --out whole
check "verify" run latentprep verify whole
check "fit" run "${fit[@]}" --out runs/whole
check "eval" run latenttrain eval runs/whole whole
check "report" run latentprep report whole
if [ -z "${EXTRAS+given}" ]; then
    check "fit --tensorboard" run latenttrain fit whole --width 0.25 --limit 100 --epochs 1 --tensorboard
    check "what autoencoders, buckets and the hub need" run python -c "import diffusers.models, obstore, huggingface_hub"
fi
mkdir -m 777 "$scratch/data"
check "any other user, and a folder" "$ENGINE" run --rm --read-only --network none --user 4321:4321 --volume "$scratch/data:/data" \
    "$TAG" sh -c "latentprep encode shapes --limit 20 --codec dct && rm -r shards"

say "SIGTERM to process 1"
check "encode ends, and says how to go on" stopped "stopped/records/*" "run the same command again" "${encode[@]}" --out stopped
check "encode goes on" run "${encode[@]}" --out stopped
check "the bytes are those of an encode that nobody stopped" same whole stopped .
check "fit ends, and says how to go on" stopped runs/stopped/metrics.jsonl "resume" "${fit[@]}" --out runs/stopped
check "fit goes on" run "${fit[@]}" --out runs/stopped
check "the weights are those of a fit that nobody stopped" same runs/whole runs/stopped best.safetensors
say "every check passed"
