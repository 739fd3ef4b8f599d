# shellcheck shell=bash
# The environment that the scripts share. To be sourced: it defines REPO and VENV, and `ensure_env runtime|dev`.
#
#   P2PMODEL_VENV    folder of the environment (default: .venv beside this folder)
#   P2PMODEL_PYTHON  the Python to make it with (default: the first of python3, python3.11, python3.12 that is 3.11 or 3.12)

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${P2PMODEL_VENV:-$REPO/.venv}
case $VENV in /*) ;; *) VENV=$PWD/$VENV ;; esac

say() { printf '==> %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

fits() { "$1" -c 'import sys; raise SystemExit(not (3, 11) <= sys.version_info < (3, 13))' >/dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in ${P2PMODEL_PYTHON:-python3 python3.11 python3.12}; do
        if fits "$candidate"; then command -v "$candidate"; return; fi
    done
    local first=${P2PMODEL_PYTHON:-python3} version
    version=$("$first" --version 2>/dev/null) || version="not there"
    die "p2pmodel needs Python 3.11 or 3.12, and $first is $version. Install one of them, or name it:" \
        "P2PMODEL_PYTHON=/path/to/python3.11 $0"
}

# pip of the environment, or where a distribution has stripped ensurepip from Python, its own pip on the environment.
venv_pip() {
    if "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        "$VENV/bin/python" -m pip --disable-pip-version-check "$@"
    else
        "$PYTHON" -m pip --disable-pip-version-check --python "$VENV/bin/python" "$@"
    fi
}

make_venv() {
    PYTHON=$(find_python)
    if ! fits "$VENV/bin/python"; then
        say "making an environment in $VENV with $("$PYTHON" --version)"
        if "$PYTHON" -c 'import ensurepip' >/dev/null 2>&1; then
            "$PYTHON" -m venv --clear "$VENV"
        else
            "$PYTHON" -m venv --clear --without-pip "$VENV"
        fi
    fi
    venv_pip --version >/dev/null 2>&1 || die "pip 22.3 or later is needed. On Debian: apt install python3-pip"
}

# A stamp holds the hash of what the installation came from, so that repeating costs nothing.
stamp() { (cd "$REPO" && printf '%s\n' "$REPO" "$1" && cat pyproject.toml requirements/*.txt) | sha256sum | cut -d' ' -f1; }

ensure_env() {
    local kind=$1 locks=(-r "$REPO/requirements/lock.txt") want
    [ "$kind" = runtime ] || locks+=(-r "$REPO/requirements/lock-dev.txt")
    want=$(stamp "$kind")
    exec 9<"$REPO"
    flock --nonblock 9 || { say "waiting for another installation from this folder"; flock 9; }
    if ! { [ "$(cat "$VENV/.installed-$kind" 2>/dev/null)" = "$want" ] && fits "$VENV/bin/python"; }; then
        make_venv
        # torch first, with its dependencies: a CUDA build, where pip chooses one, brings its own libraries.
        say "installing torch (the largest part; minutes on a slow line)"
        venv_pip install -qq -c "$REPO/requirements/lock.txt" "$(grep '^torch==' "$REPO/requirements/lock.txt")"
        # Without dependencies, because the lock is complete, and one of its versions is not the one that a package asks
        # for (docs/CONTRIBUTING.md).
        say "installing the other packages of the lock"
        venv_pip install -qq --no-deps "${locks[@]}"
        say "installing p2pmodel itself, editable"
        venv_pip install -qq --no-deps -e "$REPO"
        echo "$want" >"$VENV/.installed-$kind"
    fi
    exec 9<&-
}
