#!/usr/bin/env bash
# llama-cpp-py-sync 0.11739: the wheel is tagged manylinux2014, for every Linux with glibc 2.17 or newer, so pip installs it on all of them; its libllama.so
# asks for symbols of glibc 2.38, and on older systems (Debian 12, Ubuntu 22.04) the first use ends with "GLIBC_2.38 not found". Expected: a tag
# manylinux_2_38, which pip would refuse there. `make interop` therefore builds llama.cpp's server from source instead of taking the library of a wheel.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check pyelftools==0.32
pip download -q --disable-pip-version-check --no-deps --only-binary :all: --platform manylinux2014_x86_64 llama-cpp-py-sync==0.11739 -d .

python - <<'EOF'
import glob, io, platform, zipfile
from elftools.elf.elffile import ELFFile

(name,) = glob.glob("*.whl")
wheel = zipfile.ZipFile(name)
library = next(entry for entry in wheel.namelist() if entry.endswith("libllama.so"))
versions = {
    auxiliary.name
    for section in ELFFile(io.BytesIO(wheel.read(library))).iter_sections()
    if section.name == ".gnu.version_r"
    for _, auxiliaries in section.iter_versions()
    for auxiliary in auxiliaries
    if auxiliary.name.startswith("GLIBC_2")
}
newest = max(tuple(map(int, version.removeprefix("GLIBC_").split("."))) for version in versions)
print("wheel:", name)
print("newest symbols of glibc that libllama.so asks for:", ".".join(map(str, newest)), "; here is glibc", platform.libc_ver()[1])

# Expected: at most 2.17, as manylinux2014 says.
assert "manylinux2014" in name and newest > (2, 17), "changed: the wheel keeps what its tag promises"
EOF
