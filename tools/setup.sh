#!/bin/sh
# Make the virtual environment .venv from the locked requirements:  tools/setup.sh server|dev [PYTHON]
#
# server  what `portico up` and `portico demo` need          dev  that, and what the tests and checks need
#
# Every package comes with its hash and as a wheel, so nothing is compiled and nothing unlisted gets in. `uv` is used when
# it is on PATH, otherwise pip; both only add to the environment (one lock serves both sets, so their versions agree) and
# therefore `server` never breaks a `dev` environment. Called by the Makefile, which knows when it is needed.
set -eu

set_name=$1
wanted_python=${2:-}
venv=.venv
cd "$(dirname "$0")/.."

fail() {
    echo "portico: $1" >&2
    exit 1
}

recent_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# Built with profile-guided optimization, as distributions and python.org do and version managers often do not: relays and
# agents need a seventh less CPU on one. Debian sets it past `configure`, so the prefix /usr has to stand for a distribution's
# own. One that cannot make environments is no choice, nor is one before 3.11.5, unless it is the one people mean: asyncio's TLS
# and the parser have faults there that the tests meet.
optimized() {
    "$1" -c 'import ensurepip, sys, sysconfig, venv
configured = sysconfig.get_config_var("CONFIG_ARGS") or ""
quick = "--enable-optimizations" in configured or sys.base_prefix == "/usr"
sys.exit(not quick or sys.version_info < (3, 11, 5))' >/dev/null 2>&1
}

# The first interpreter that is new enough and optimized, otherwise the first that is new enough; plain python3 first, because
# it is the one people mean, then the system's own behind a version manager's.
find_python() {
    for test in optimized recent_enough; do
        for candidate in ${wanted_python:-python3 /usr/bin/python3 python3.13 python3.12 python3.11 python3.14}; do
            if command -v "$candidate" >/dev/null 2>&1 && recent_enough "$candidate" && "$test" "$candidate"; then
                echo "$candidate"
                return
            fi
        done
    done
    if command -v "${wanted_python:-python3}" >/dev/null 2>&1; then
        found=$("${wanted_python:-python3}" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo unusable)
        fail "Python 3.11 or newer is needed; ${wanted_python:-python3} here is $found. Install a newer one, or name it: make setup PYTHON=/path/to/python3.12"
    fi
    fail "Python 3.11 or newer is needed and none was found. On Debian or Ubuntu: apt-get install python3 python3-venv"
}

make_venv() {
    python=$(find_python)
    if [ -n "$uv" ]; then
        "$uv" venv --quiet --clear --no-python-downloads --python "$(command -v "$python")" "$venv"
        return
    fi
    # Debian ships Python without ensurepip; its own message about that is a page long.
    if ! "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
        minor=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
        [ "$python" = python3 ] && minor=python3-venv
        fail "this Python cannot make virtual environments. On Debian or Ubuntu: apt-get install $minor"
    fi
    "$python" -m venv --clear "$venv"
}

uv=$(command -v uv || true)
# A version-manager shim may be on PATH and still not run.
if [ -n "$uv" ] && ! "$uv" --version >/dev/null 2>&1; then uv=; fi

# An environment whose interpreter is gone or too old is made anew.
recent_enough "$venv/bin/python" || make_venv

echo "portico: installing requirements/$set_name.txt into $venv with ${uv:-pip}" >&2
if [ -n "$uv" ]; then
    export VIRTUAL_ENV="$PWD/$venv"
    # pip compiles what it installs; uv does so only when told, and every process would compile again where it may not write.
    "$uv" pip install --quiet --compile-bytecode --require-hashes --only-binary :all: -r "requirements/$set_name.txt"
    "$uv" pip install --quiet --no-deps --no-build-isolation -e .
else
    # A dev environment that uv made has no pip of its own.
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || make_venv
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: \
        -r "requirements/$set_name.txt"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
fi
