# Sourced by other scripts: finds a Python, makes .venv in the repository and installs into it.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

die() {
  echo "$(basename "$0"): error: $*" >&2
  exit 2
}

# Whether a Python can run this package: version 3.11 or later with venv and ensurepip.
usable_python() {
  command -v "$1" >/dev/null 2>&1 &&
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
  if [ -n "${PYTHON:-}" ]; then
    usable_python "$PYTHON" ||
      die "PYTHON=$PYTHON is not Python 3.11 or later with the venv module; set another"
    echo "$PYTHON"
    return
  fi
  local candidate
  for candidate in python3.12 python3.11 python3.13 python3 python; do
    if usable_python "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  die "no Python 3.11 or later with the venv module found; install one (Debian, Ubuntu: apt" \
    "install python3 python3-venv), or give its path: PYTHON=/path/to/python3.12 bin/$(basename "$0")"
}

# install EXTRAS: installs the package, editable, into .venv, unless it is there already.
# Sets $python to the environment's interpreter.
install() {
  local extras="$1" venv="$root/.venv" stamp wanted found
  python="$venv/bin/python"
  stamp="$venv/.relaxnet-jax-$( [ -n "$extras" ] && echo test || echo base )"
  wanted="$root $(cksum <"$root/pyproject.toml")"
  if [ -x "$python" ] && [ -n "${PYTHON:-}" ]; then
    found="$("$python" -c 'import sys; print(sys.version_info[:2])' 2>/dev/null || true)"
    if [ "$found" != "$("$PYTHON" -c 'import sys; print(sys.version_info[:2])')" ]; then
      echo "== .venv has another Python version than PYTHON=$PYTHON: recreating it"
      rm -rf "$venv"
    fi
  fi
  if ! usable_python "$python"; then
    local base
    base="$(find_python)"
    echo "== making .venv with $base ($("$base" --version 2>&1))"
    rm -rf "$venv"
    "$base" -m venv "$venv"
  fi
  if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
    echo "== installing relaxnet-jax and what it needs into .venv (minutes the first time)"
    "$python" -m pip install --quiet --disable-pip-version-check -e "$root$extras" ||
      die "pip could not install the package (see above); check the network and the package index"
    echo "$wanted" >"$stamp"
  fi
}
