"""What gistrag is made of: the hashes of its dependencies, and a list of them in the format CycloneDX.

python .ci/supply.py hashes     writes constraints-hashed.txt, by what pip chooses for this platform
python .ci/supply.py sbom       prints the libraries that gistrag needs with its extras, as they are installed here
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
EXTRAS = ("models", "server", "mcp", "office", "ko", "synthesize")
HEADER = """\
# constraints.txt with hashes, for CPython 3.11 on x86-64 Linux; `make hashes` writes it.
# torch is the build for the CPU, from the index of PyTorch.
# pip install --require-hashes -r constraints-hashed.txt && pip install --no-deps .
"""


def normal(name: str) -> str:
    """Return the normal form of a package's name."""
    return re.sub("[-_.]+", "-", name).lower()


def hashed() -> str:
    """Return the constraints with the hash of the file that pip would install; nothing is installed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
        subprocess.run([*pip, "--report", report, "-r", ROOT / "constraints.txt"], check=True)
        return lines_of(json.loads(report.read_text("utf-8")))


def lines_of(report: dict[str, Any]) -> str:
    """Return a report of pip as lines of a file of requirements."""
    rows = []
    for one in report["install"]:
        name, version = one["metadata"]["name"], one["metadata"]["version"]
        rows.append(
            f"{normal(name)}=={version} --hash=sha256:{one['download_info']['archive_info']['hashes']['sha256']}"
        )
    return HEADER + "\n".join(sorted(rows)) + "\n"


def needed() -> dict[str, Distribution]:
    """Return the distributions that gistrag with its extras needs here, by name."""
    found: dict[str, Distribution] = {}
    waiting = [("gistrag", EXTRAS)]
    seen = set()
    while waiting:
        name, extras = waiting.pop()
        for extra in ("", *extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                found[name] = distribution(name)
            except PackageNotFoundError:  # an extra that is not installed here
                continue
            for line in found[name].requires or ():
                one = Requirement(line)
                if one.marker is None or one.marker.evaluate({"extra": extra}):
                    waiting.append((normal(one.name), tuple(one.extras)))
    return found


def component(name: str, found: Distribution) -> dict[str, Any]:
    """Return a library as CycloneDX describes it."""
    named = {"type": "library", "name": name, "version": found.version, "purl": f"pkg:pypi/{name}@{found.version}"}
    about = found.metadata
    if expression := about.get("License-Expression"):
        return {**named, "licenses": [{"expression": expression}]}
    classified = [one.rpartition(" :: ")[2] for one in about.get_all("Classifier", []) if one.startswith("License")]
    told = classified or [line for line in [(about.get("License") or "").strip()] if line and "\n" not in line]
    return {**named, **({"licenses": [{"license": {"name": one}} for one in told]} if told else {})}


def bundled() -> list[dict[str, Any]]:
    """Return what the wheel carries beside the code: the adapter, and the libraries of the page."""
    model = {"type": "machine-learning-model", "name": "gistrag adapter smollm2-135m-instruct"}
    parts: list[dict[str, Any]] = [{**model, "licenses": [{"license": {"id": "CC-BY-SA-4.0"}}]}]
    listed = (ROOT / "gistrag/server/static/vendor/VERSIONS.txt").read_text("utf-8").splitlines()
    for sha256, _, package, _, license_ in (line.split("  ", 4) for line in listed if not line.startswith("#")):
        name, version = package.split("@")
        parts.append(
            {
                "type": "library",
                "name": name,
                "version": version,
                "purl": f"pkg:npm/{package}",
                "hashes": [{"alg": "SHA-256", "content": sha256}],
                "licenses": [{"expression": license_.partition(" (")[0]}],
            }
        )
    return parts


def sbom() -> dict[str, Any]:
    """Return all of it as one document of CycloneDX 1.6."""
    libraries = needed()
    gistrag = libraries.pop("gistrag")
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {**component("gistrag", gistrag), "type": "application"}},
        "components": [*(component(name, found) for name, found in sorted(libraries.items())), *bundled()],
    }


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["hashes"]:
            (ROOT / "constraints-hashed.txt").write_text(hashed(), "utf-8")
        case ["sbom"]:
            print(json.dumps(sbom(), indent=2))
        case _:
            sys.exit(__doc__)
