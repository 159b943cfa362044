"""The launcher, run as a program on a small project beside a pip and a uv that only note what they are asked.

What it takes to install the real environment is proven by the run of these tests itself: it comes through the
launcher.
"""

import ast
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCHER = Path(__file__).parents[2] / "drawbridge"
PYTHON = Path(sys.executable).resolve()

PIP = """\
#!{python}
import pathlib, sys
if sys.argv[1:3] == ["config", "list"]:
    print(pathlib.Path({settings!r}).read_text())
elif sys.argv[1] == "install":
    sys.exit("ERROR: no route to the index")
"""

UV = """\
#!{python}
import json, os, pathlib, sys, time
os.chdir(sys.argv[sys.argv.index("--directory") + 1])
asked = dict(arguments=sys.argv[1:], environment=dict(os.environ), lock=pathlib.Path("uv.lock").read_text())
with open({log!r}, "a") as log:
    log.write(json.dumps(asked) + "\\n")
time.sleep(0.3)  # long enough for another start to arrive
if asked["lock"] == "broken":
    sys.exit("error: hash mismatch")
python = pathlib.Path(".venv/bin/python")
python.parent.mkdir(parents=True, exist_ok=True)
if sys.argv[1] in ("sync", "venv"):
    python.unlink(missing_ok=True)
    python.symlink_to({python!r})
"""

APP = """\
import json, os, sys
print(json.dumps(dict(arguments=sys.argv[1:], directory=os.getcwd(), code=__file__)))
sys.exit(7 if "fail" in sys.argv else 0)
"""


@dataclasses.dataclass(frozen=True, slots=True)
class UvCall:
    """One call of uv: its arguments, its environment and the lock file it found."""

    arguments: list[str]
    environment: dict[str, str]
    lock: str


class Project:
    """A checkout with nothing in it but what the launcher needs."""

    def __init__(self, root: Path) -> None:
        self.root = root / "checkout"
        self.programs = root / "programs"
        self.pip_settings = root / "pip-settings"
        self._log = root / "uv.log"
        for folder in (
            self.root / "app",
            self.root / "tests",
            self.root / ".uv" / "0.13.9" / "bin",
            self.programs,
        ):
            folder.mkdir(parents=True)
        (self.root / "drawbridge").write_bytes(LAUNCHER.read_bytes())
        (self.root / "drawbridge").chmod(0o755)
        (self.root / "pyproject.toml").write_text("[project]\nname = 'small'\n")
        (self.root / "app" / "__main__.py").write_text(APP)
        (self.root / "tests" / "run.py").write_text(APP)
        self.lock("first")
        self.pip_settings.write_text("")
        self.program(self.programs / "pip3", PIP.format(python=PYTHON, settings=str(self.pip_settings)))
        self.uv = self.root / ".uv" / "0.13.9" / "bin" / "uv"
        self.program(self.uv, UV.format(python=str(PYTHON), log=str(self._log)))
        (self.programs / "python3").symlink_to(PYTHON)
        # A Python without pip, as Debian's is without python3-pip: the environment's folder is bare.
        bare = root / "bare"
        (bare / "bin").mkdir(parents=True)
        (bare / "pyvenv.cfg").write_text(f"home = {PYTHON.parent}\ninclude-system-site-packages = false\n")
        (bare / "bin" / "python3").symlink_to(PYTHON)
        self.bare_python = bare / "bin" / "python3"

    @staticmethod
    def program(path: Path, text: str) -> None:
        """Write an executable file."""
        path.write_text(text)
        path.chmod(0o755)

    def lock(self, text: str) -> None:
        """Replace the lock file."""
        (self.root / "uv.lock").write_text(text)

    @property
    def environment(self) -> dict[str, str]:
        """The environment starts run in: only this project's programs, and a home of its own."""
        return {"PATH": str(self.programs), "HOME": str(self.root.parent / "home"), "LC_ALL": "C.UTF-8"}

    def begin(self, *arguments: str, cwd: Path | None = None, **variables: str) -> subprocess.Popen[str]:
        """Begin a start of the launcher by the Python without pip."""
        return subprocess.Popen(
            [self.bare_python, self.root / "drawbridge", *arguments],
            cwd=cwd or self.root,
            env=self.environment | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def start(self, *arguments: str, cwd: Path | None = None, **variables: str) -> tuple[int, str, str]:
        """Start the launcher and return exit code, output and errors."""
        process = self.begin(*arguments, cwd=cwd, **variables)
        output, errors = process.communicate(timeout=60)
        return process.returncode, output, errors

    def uv_calls(self) -> list[UvCall]:
        """Return what uv was asked so far, oldest first."""
        if not self._log.exists():
            return []
        return [UvCall(**json.loads(line)) for line in self._log.read_text().splitlines()]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """Give a small checkout that was never started."""
    return Project(tmp_path)


def test_first_start_installs_and_the_next_asks_nobody(project: Project) -> None:
    """Once in step, a start runs the program at once: no uv, no pip, not a word on stderr."""
    first = project.start("list")
    project.uv.unlink()
    (project.programs / "pip3").unlink()
    second = project.start("list")
    assert first[0] == second[0] == 0
    assert "installing the locked environment" in first[2]
    assert second[2] == ""
    assert second[1] == first[1]


@pytest.mark.parametrize("changed", ["uv.lock", "pyproject.toml"])
def test_changed_lock_or_project_is_installed_at_the_next_start(project: Project, changed: str) -> None:
    """The environment follows the files that say what it holds."""
    project.start()
    (project.root / changed).write_text("second")
    project.start()
    project.start()
    assert len(project.uv_calls()) == 2


def test_lost_environment_is_made_again(project: Project) -> None:
    """A dangling interpreter, as a system upgrade leaves it, is not mistaken for a ready environment."""
    project.start()
    interpreter = project.root / ".venv" / "bin" / "python"
    interpreter.unlink()
    interpreter.symlink_to("/nonexistent/python3.11")
    assert project.start()[0] == 0
    assert len(project.uv_calls()) == 2


def test_two_starts_at_once_install_once(project: Project) -> None:
    """The second start waits for the first and finds the work done."""
    starts = [project.begin("list") for _ in range(2)]
    ends = [start.communicate(timeout=60) for start in starts]
    assert [start.returncode for start in starts] == [0, 0]
    assert len(project.uv_calls()) == 1
    assert sum("waiting" in errors for _, errors in ends) == 1


def test_arguments_exit_code_and_directory_are_the_callers(project: Project, tmp_path: Path) -> None:
    """The program gets the words as they were given and runs where the caller stands."""
    code, output, _ = project.start("caller", "add", "a b", "--json", "fail", cwd=tmp_path)
    assert code == 7
    assert json.loads(output) == {
        "arguments": ["caller", "add", "a b", "--json", "fail"],
        "directory": str(tmp_path),
        "code": str(project.root / "app" / "__main__.py"),
    }


def test_app_folder_where_the_caller_stands_is_not_run(project: Project, tmp_path: Path) -> None:
    """Only the checkout's code runs, whatever lies in the current directory."""
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "__main__.py").write_text("raise SystemExit('the wrong program')")
    code, output, _ = project.start(cwd=tmp_path)
    assert code == 0
    assert json.loads(output)["code"].startswith(str(project.root))


def test_symlink_on_path_finds_its_checkout(project: Project, tmp_path: Path) -> None:
    """A link to the launcher works by its name from anywhere, through its own first line."""
    (project.programs / "drawbridge").symlink_to(project.root / "drawbridge")
    env = project.environment | {"PATH": f"{project.programs}{os.pathsep}{os.defpath}"}
    done = subprocess.run(
        ["drawbridge", "x"], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["arguments"] == ["x"]
    assert (project.root / ".venv" / "bin" / "python").exists()


def test_test_command_adds_the_development_group_and_a_later_start_keeps_it(project: Project) -> None:
    """Running the product between two test runs takes nothing away, before and after a change of the lock."""
    project.start("list")
    _, output, _ = project.start("test", "-k", "name")
    project.start("list")
    project.lock("second")
    project.start("list")
    project.start("test")
    assert json.loads(output)["code"] == str(project.root / "tests" / "run.py")
    assert json.loads(output)["arguments"] == ["-k", "name"]
    groups = [call.arguments[2:4] for call in project.uv_calls()]
    assert groups == [["--no-dev", "--inexact"], ["--group", "dev"], ["--group", "dev"]]


def test_environment_somebody_else_filled_loses_nothing(project: Project) -> None:
    """What a developer put into .venv stays; an environment of our own is trimmed to the lock file."""
    project.start()
    project.lock("second")
    project.start()
    assert ["--inexact" in call.arguments for call in project.uv_calls()] == [True, False]


def test_uv_is_told_never_to_fetch_a_python_and_nobodys_settings_change_the_outcome(project: Project) -> None:
    """Settings that would install something else or elsewhere stay outside; the network's are passed on."""
    project.start(
        UV_FROZEN="1", UV_PROJECT_ENVIRONMENT="/elsewhere", VIRTUAL_ENV="/other", UV_HTTP_TIMEOUT="9"
    )
    environment = project.uv_calls()[0].environment
    assert environment["UV_PYTHON_DOWNLOADS"] == "never"
    assert environment["UV_PROJECT_ENVIRONMENT"] == str(project.root / ".venv")
    assert environment["UV_HTTP_TIMEOUT"] == "9"
    assert not {"UV_FROZEN", "VIRTUAL_ENV"} & environment.keys()


def test_certificate_and_proxy_of_pip_are_uvs_too(project: Project) -> None:
    """Whoever told pip how to reach the network need not say it again; the environment outranks files."""
    project.pip_settings.write_text(
        "global.cert='/old.pem'\n:env:.cert='/new.pem'\nglobal.proxy='http://proxy.example:3128'"
    )
    project.start()
    environment = project.uv_calls()[0].environment
    assert (environment["SSL_CERT_FILE"], environment["ALL_PROXY"]) == (
        "/new.pem",
        "http://proxy.example:3128",
    )


def test_index_of_pip_is_used_with_the_digests_of_the_lock_file(project: Project) -> None:
    """Behind a mirror packages come from the mirror, and each must still be the one that was locked."""
    project.pip_settings.write_text("global.index-url='https://mirror.example/simple'")
    project.start()
    assert [call.arguments[0] for call in project.uv_calls()] == ["export", "venv", "pip"]
    last = project.uv_calls()[-1]
    assert last.environment["UV_DEFAULT_INDEX"] == "https://mirror.example/simple"
    assert "--require-hashes" in last.arguments


def test_home_that_cannot_be_written_is_no_obstacle(project: Project) -> None:
    """A service user without a home gets uv's cache beside the environment."""
    project.start(HOME="/dev/null/nowhere")
    environment = project.uv_calls()[0].environment
    assert environment["UV_CACHE_DIR"] == str(project.root / ".uv" / "cache")


def test_failed_installation_says_so_and_is_tried_again(project: Project) -> None:
    """An environment that was left half filled is never taken for a ready one."""
    project.start()
    project.lock("broken")
    code, output, errors = project.start()
    assert (code, output) == (1, "")
    assert "error: hash mismatch" in errors
    assert errors.splitlines()[-1].startswith("drawbridge: the locked environment could not be installed; ")
    project.lock("first")
    assert project.start()[0] == 0
    assert len(project.uv_calls()) == 3


def test_missing_pip_is_named_with_the_next_step(project: Project) -> None:
    """Without pip there is one sentence, and it says what to install."""
    (project.programs / "pip3").unlink()
    code, _, errors = project.start()
    assert code == 1
    assert errors.startswith("drawbridge: ")
    assert errors.count("\n") == 1
    assert "has no pip; install it (Debian: apt-get install python3-pip" in errors


def test_index_that_does_not_answer_is_named_with_the_next_step(project: Project) -> None:
    """When pip cannot fetch uv, its words come first, ours say what to look at, and no half of it stays."""
    project.uv.unlink()
    (project.root / ".uv" / "incoming-of-a-killed-start").mkdir()
    code, _, errors = project.start()
    assert code == 1
    assert "ERROR: no route to the index" in errors
    assert "check the network" in errors.splitlines()[-1]
    assert not list((project.root / ".uv").glob("incoming-*"))


def test_read_only_checkout_with_a_ready_environment_works(project: Project) -> None:
    """Nothing is written, so nothing needs to be writable, as long as the environment is in step."""
    project.start()
    make_unwritable(project)
    assert project.start("list")[0] == 0
    project.lock("second")
    code, _, errors = project.start("list")
    assert code == 1
    assert "lacks runtime packages that uv.lock names and cannot be written" in errors


def test_read_only_checkout_with_somebody_elses_environment_works_and_says_so(project: Project) -> None:
    """An environment made by uv itself carries no stamp; it is used, and that it is unchecked is printed."""
    project.start()
    (project.root / ".venv" / ".drawbridge").unlink()
    make_unwritable(project)
    code, output, errors = project.start("list")
    assert code == 0
    assert json.loads(output)["arguments"] == ["list"]
    assert "was not made by this launcher" in errors


def test_read_only_checkout_without_environment_names_the_next_step(project: Project) -> None:
    """Where nothing is installed and nothing can be, there is one sentence."""
    make_unwritable(project)
    code, _, errors = project.start("list")
    assert code == 1
    assert "holds no environment; run this once as a user who may write there." in errors


def test_source_can_be_read_by_the_pythons_it_turns_away() -> None:
    """Python 3.6 must reach the sentence that it is too old, so it must be able to parse the whole file."""
    assert ast.parse(LAUNCHER.read_text(), feature_version=(3, 6)).body


def test_old_python_is_told_what_to_install(project: Project) -> None:
    """With no newer Python on PATH, one sentence names the version needed and the next step."""
    done = start_with_old_python(project)
    assert done.returncode == 1
    assert done.stderr == (
        "drawbridge: Python 3.11 or newer is needed and this is 3.9; install one "
        "(Debian 12: apt-get install python3 python3-pip) and start again.\n"
    )


def test_old_python_hands_over_to_a_newer_one_on_path(project: Project) -> None:
    """A machine whose python3 is old but that has a newer one too needs no word from anybody."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (project.programs / version).symlink_to(PYTHON)
    Project.program(project.programs / "python3.19", "#!/bin/sh\necho 'not installed here' >&2; exit 127\n")
    done = start_with_old_python(project)
    assert done.returncode == 0
    assert json.loads(done.stdout)["arguments"] == ["list"]
    assert "not installed here" not in done.stderr


def start_with_old_python(project: Project) -> subprocess.CompletedProcess[str]:
    """Start the launcher in an interpreter that says it is 3.9."""
    program = (
        "import runpy, sys; sys.version_info = (3, 9, 2, 'final', 0); "
        "sys.argv = ['drawbridge', 'list']; runpy.run_path('drawbridge', run_name='__main__')"
    )
    return subprocess.run(
        [project.bare_python, "-c", program],
        cwd=project.root,
        env=project.environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def make_unwritable(project: Project) -> None:
    """Close the folder the launcher writes to, also for root, whom no permission bit stops."""
    (project.root / ".uv").rename(project.root / "moved")
    (project.root / ".uv").write_text("not a directory")
