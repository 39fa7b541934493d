"""Installing: extras, the images' steps beside `make setup`'s, and what docs/install.md shows."""

import configparser
import re
import runpy
import shlex
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from tests.commands import BIN, ROOT, run

CONTAINER = ROOT / "launch/container"
DOCKERFILE = (CONTAINER / "Dockerfile").read_text(encoding="utf-8")
DEFINITION = (CONTAINER / "phi3v.def").read_text(encoding="utf-8")
PAGE = (ROOT / "docs/install.md").read_text(encoding="utf-8")
TEXTS = [*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "Makefile", *CONTAINER.iterdir()]

# What [cuda] may have: distributed as wheels of pure Python, looked at on PyPI.
PURE = {"liger-kernel"}
LOCKS = sorted(path.stem for path in ROOT.glob("lock/*.txt"))
# What the images must have, by who needs it.
PACKAGES = {
    "g++": "Triton's launcher",
    "git": "the commit in environment.json",
    "ibverbs-providers": "InfiniBand's drivers, for libibverbs1",
    "libibverbs1": "NCCL loads it, and goes over TCP where it cannot",
    "make": "the targets of the Makefile",
    "python3-dev": "Python.h, for Triton's launcher",
    "python3-venv": "the environment itself",
}
# What the page shows and no test can run, and why.
ELSEWHERE = {
    "make setup": "is what makes this test's environment",
    "PIP_EXTRA_INDEX_URL=": "the same, from an index",
    "source .venv/bin/activate": "changes a shell; tests call .venv/bin/python",
    "python3 -m venv .venv": "a step of make setup",
    "python -m pip install": "needs an index",
    "python -m pip wheel": "needs an index",
    "PIP_NO_INDEX=1": "needs what `pip wheel` brought",
    "CUDA_HOME=": "needs nvcc and hours",
    "export HF_HUB_OFFLINE=1": "changes a shell",
    "hf download": "needs the hub",
    "make gpu": "needs a GPU",
    "docker": "needs a registry of images",
    "apptainer": "needs a registry of images",
    "enroot": "needs Docker",
    "deepspeed launch/train.py launch/recipes/phi35.yaml": "needs the published weights",
}


def extras() -> dict[str, list[str]]:
    """The requirements of each extra of setup.cfg."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return {name: text.split() for name, text in parser["options.extras_require"].items()}


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=;\[ ]", requirement)[0] for requirement in requirements}


def test_the_cuda_extra_needs_no_compiler() -> None:
    """flash-attn's package is source alone, and compiles for hours or fails without nvcc."""
    required = names(extras()["cuda"])
    assert required <= PURE
    for name in required:
        try:
            wheel = distribution(name).read_text("WHEEL") or ""
        except PackageNotFoundError:
            continue
        assert "Root-Is-Purelib: true" in wheel, f"{name} as installed here is not pure Python"


def test_flash_attn_is_an_extra_of_its_own() -> None:
    having = {name for name, required in extras().items() if "flash-attn" in names(required)}
    assert having == {"flash-attn"}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_extras_that_are_named_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for listed in re.findall(r"['`]\.?\[([a-z,-]+)\]['`]", text):
        assert set(listed.split(",")) <= set(extras()), f"{path}: [{listed}]"


def test_the_pins_are_of_packages_that_setup_cfg_asks_for() -> None:
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    for name in names(extras()["cuda"]) | names(extras()["test"]):
        assert re.search(rf"^{name}==", pinned, flags=re.MULTILINE | re.IGNORECASE), name


# --- the lock ---

BLOCK = re.compile(
    r"([a-z0-9-]+)==(\S+)( ; [^\\]+)? \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)"
)


def locked(name: str) -> dict[str, set[str]]:
    """The versions of a lock file, each line of which pins a package with its hashes."""
    text = (ROOT / f"lock/{name}.txt").read_text(encoding="utf-8")
    head, _, rest = text.partition("\n")
    assert head.startswith("# Made by `make lock`") and not BLOCK.sub("", rest), f"lock/{name}.txt"
    versions: dict[str, set[str]] = {}
    for found in BLOCK.finditer(rest):
        versions.setdefault(found[1], set()).add(found[2])
    return versions


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    named = (line.split(" ; ")[0].partition("==") for line in lines if not line.startswith("#"))
    return {name.lower(): version for name, _, version in named}


@pytest.mark.parametrize("name", LOCKS)
def test_the_lock_has_the_versions_of_the_constraints(name: str) -> None:
    for package, versions in locked(name).items():
        wanted = pins().get(package)
        known = {version.partition("+")[0] for version in versions}
        assert wanted is None or wanted in known, f"{package}: {versions}, not {wanted}; make lock"


def test_the_lock_has_all_that_setup_cfg_asks_for() -> None:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    asked = {
        *names(parser["options"]["install_requires"].split()),
        *names(extras()["cuda"]),
    }
    training = {**locked("build"), **locked("torch"), **locked("packages")}
    assert asked <= training.keys()
    tested = names(extras()["test"]) | names(extras()["kernels"])
    assert {name.lower() for name in tested} <= training.keys() | locked("test").keys()
    assert names(extras()["supply"]) <= locked("tools").keys()


# What pip offers of torch, and what is then installed: by lists, and by pip with all it needs.
OFFERED = [
    ("2.13.0", None, ["torch"], False),
    ("2.13.0+cpu", "2.13.0+cpu", ["cpu"], False),
    ("2.13.0+cpu", None, ["cpu"], True),  # of a Python whose wheel is not in cpu.txt
    ("2.13.0+cu126", None, [], True),
]


@pytest.mark.parametrize(("offered", "installed", "lists", "is_free"), OFFERED)
def test_a_build_of_torch_without_known_hashes_is_said(
    offered: str,
    installed: str | None,
    lists: list[str],
    is_free: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = runpy.run_path(str(ROOT / "lock/install.py"))
    names, commands = [], []
    place = script["install_torch"].__globals__
    place["install_locked"] = names.append
    place["installed"] = lambda _: installed
    place["pip"] = lambda *arguments: commands.append(arguments)
    script["install_torch"](offered)
    assert names == lists
    assert [arguments[-1] for arguments in commands] == [f"torch=={offered}"] * is_free
    said = f"torch {offered} is not in lock/: neither it nor its libraries are compared with hashes"
    assert capsys.readouterr().err == (f"{said}\n" if is_free else "")


def test_the_build_is_by_locked_tools() -> None:
    assert {"pip", "setuptools", "wheel"} <= locked("build").keys()
    assert "--no-build-isolation" in (ROOT / "lock/install.py").read_text(encoding="utf-8")


def test_what_is_locked_and_installed_here_is_the_same() -> None:
    """Of this environment: it was made by lock/install.py, or has the same versions."""
    for name in ("packages", "test"):
        for package, versions in locked(name).items():
            try:
                assert distribution(package).version in versions, package
            except PackageNotFoundError:
                continue  # of another Python or platform


AUDITS = {
    "none": ('{"dependencies": [{"name": "a", "version": "1", "vulns": []}]}', 0, "0 known"),
    "some": (
        '{"dependencies": [{"name": "a", "version": "1", "vulns": [{"id": "PYSEC-1", "aliases": '
        '["CVE-1"], "fix_versions": ["2"]}]}, {"name": "b", "skip_reason": "not found"}]}',
        1,
        "a 1: PYSEC-1, CVE-1; mended in 2",
    ),
    "not all": (
        '{"dependencies": [{"name": "b", "skip_reason": "b was not found"}]}',
        2,
        "1 of 1 packages could not be looked up, such as: b was not found; run make audit",
    ),
    "no network": ("", 2, "nothing was looked up; pip-audit ended with: ERROR: no connection"),
}


@pytest.mark.parametrize("case", AUDITS)
def test_an_audit_says_what_was_found_and_what_was_not_looked_up(
    case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found, code, line = AUDITS[case]
    script = runpy.run_path(str(ROOT / "lock/audit.py"))
    assert script["tell"](found, "a traceback\nERROR: no connection\n") == code
    said = capsys.readouterr()
    assert line in said.out + said.err


def joined(text: str) -> list[str]:
    """Lines without comments, continued ones put together."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    return [line.strip() for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line]


def instructions(keyword: str) -> list[str]:
    """What stands behind a keyword of the Dockerfile."""
    lines = joined(DOCKERFILE)
    return [line.split(maxsplit=1)[1] for line in lines if line.split()[0] == keyword]


def section(name: str) -> list[str]:
    """The lines of a section of the definition."""
    found = re.search(rf"^%{name}\n(.*?)(?=^%|\Z)", DEFINITION, flags=re.MULTILINE | re.DOTALL)
    assert found, name
    return joined(found[1])


def docker_commands() -> list[str]:
    """The shell commands of RUN, its own options left out."""
    runs = [re.sub(r"^(--\S+\s+)*", "", line) for line in instructions("RUN")]
    return [command.strip() for line in runs for command in line.split("&&")]


def setup_commands() -> list[str]:
    """What `make setup` does to a folder without .venv."""
    command = ["make", "--dry-run", "--always-make", "--no-print-directory", "setup"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [line.split("||")[-1] for line in done.stdout.splitlines()]


def python_steps(commands: list[str]) -> list[list[str]]:
    """The commands that run Python, with make's places named as the images', without the tests."""
    named = [
        command.replace(".venv", "/opt/venv").removesuffix(" test")
        if "/opt/venv" not in command
        else command
        for command in commands
    ]
    steps = [shlex.split(command) for command in named]
    return [words for words in steps if words and words[0].endswith(("python", "python3"))]


def test_both_images_are_set_up_as_make_does_it() -> None:
    wanted = python_steps(setup_commands())
    assert wanted[1:] == [["/opt/venv/bin/python", "lock/install.py"]]
    assert python_steps(docker_commands()) == wanted
    assert python_steps(section("post")) == wanted


def packages(commands: list[str]) -> set[str]:
    """What apt-get installs."""
    (line,) = (command for command in commands if "apt-get install" in command)
    words = shlex.split(line)
    return {word for word in words[words.index("install") + 1 :] if not word.startswith("-")}


def test_both_images_have_what_the_code_needs() -> None:
    assert packages(docker_commands()) == set(PACKAGES)
    assert packages(section("post")) == set(PACKAGES)


def test_both_images_are_of_one_base_and_take_the_same_arguments() -> None:
    (base,) = instructions("FROM")
    assert base == "nvidia/cuda:${CUDA}-base-ubuntu24.04"
    assert f"From: {base.replace('${CUDA}', '{{ CUDA }}')}\n" in DEFINITION
    assert section("arguments") == instructions("ARG")
    (default,) = (value for value in instructions("ARG") if value.startswith("CUDA="))
    assert f"`nvidia/cuda:{default.removeprefix('CUDA=')}-base-ubuntu24.04`" in PAGE
    for argument in re.findall(r"--build-arg (\w+)=", PAGE):
        assert argument in [value.split("=")[0] for value in instructions("ARG")]


def test_both_images_have_the_files_that_setup_reads() -> None:
    copied = {source for line in instructions("COPY") for source in line.split()[:-1]}
    assert {line.split()[0] for line in section("files")} == copied
    assert all(line == f"{line.split()[0]} /phi3v/{line.split()[0]}" for line in section("files"))
    needed = {"setup.cfg", "pyproject.toml", "constraints.txt", "README.md", "LICENSE", "lock"}
    assert copied == needed | {"phi3v"}
    assert all((ROOT / name).exists() for name in copied)


def test_both_images_put_their_python_first() -> None:
    """slurm/train.sh calls python3 in a container."""
    assert "PATH=/opt/venv/bin:${PATH}" in instructions("ENV")
    assert section("environment") == ["export PATH=/opt/venv/bin:$PATH"]


def test_hadolint_has_nothing_to_say_of_the_dockerfile() -> None:
    linter = shutil.which("hadolint", path=str(BIN)) or shutil.which("hadolint")
    if linter is None:
        pytest.skip("hadolint is missing; make setup installs it ([test] in setup.cfg)")
    done = run(linter, "--no-color", CONTAINER / "Dockerfile", cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_definition_is_valid_shell(tmp_path: Path) -> None:
    for name in ("post", "environment"):
        script = tmp_path / name
        script.write_text("\n".join(section(name)).replace("{{", "").replace("}}", ""))
        done = run("sh", "-n", script, cwd=tmp_path)
        assert done.returncode == 0, done.stderr


def page_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


@pytest.mark.slow
def test_every_command_of_the_page_runs_or_says_why_not() -> None:
    ran = 0
    for command in page_commands():
        if command.startswith(tuple(ELSEWHERE)):
            continue
        program, *arguments = shlex.split(command)
        done = run(BIN / program, *arguments, cwd=ROOT)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        ran += 1
    assert ran >= 1
    for start in ELSEWHERE:
        assert any(command.startswith(start) for command in page_commands()), start


def test_files_that_the_page_names_exist() -> None:
    for name in re.findall(r"\b(?:launch|ds_configs|slurm)/[\w./]+\w", PAGE):
        assert (ROOT / name).exists(), name
