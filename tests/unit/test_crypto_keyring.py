"""The keyring is read whole or refused with every fault, and shows none of its keys."""

import base64
import json
import pickle
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from app.crypto.envelope import Place, open_, seal
from app.crypto.keyring import Kek, Keyring
from app.errors import KeyringFault, Unopenable
from app.secret import Secret

ROOT = Path(__file__).parents[2]
ONE, TWO = (base64.b64encode(bytes([number]) * 32).decode() for number in (1, 2))


@dataclass(frozen=True)
class Chosen:
    """As much of the settings as loading a keyring needs."""

    state_dir: Path
    environment: str = "development"
    keyring: Secret | None = None
    keyring_file: Path | None = None


def load(chosen: Chosen) -> Keyring:
    """What the program does at its start."""
    return Keyring.load(chosen)  # type: ignore[arg-type]


def text(active: object = "k1", **keys: object) -> Secret:
    """A keyring as the environment holds it."""
    return Secret(json.dumps({"active": active, "keys": keys}))


def written(folder: Path, *, mode: int = 0o600) -> Path:
    """A keyring file."""
    file = folder / "keys.json"
    file.write_text(text(k1=ONE).reveal())
    file.chmod(mode)
    return file


class TestText:
    def test_it_knows_its_names_and_which_is_active(self) -> None:
        """In the order they were written."""
        keyring = Keyring.from_text(text("k2", k1=ONE, k2=TWO))
        assert keyring.ids == ("k1", "k2")
        assert keyring.active_hint == "k2"
        assert keyring.get("k1").id == "k1"

    @pytest.mark.parametrize(
        ("content", "fault"),
        [
            ("", "not JSON"),
            ("k1=" + ONE, "not JSON"),
            ("[" * 100_000, "not JSON"),
            ("[]", "one JSON object"),
            ('{"keys":{}}', "one JSON object"),
            ('{"active":"k1","keys":{"k1":"x"},"kyes":{}}', "one JSON object"),
            ('{"active":"k1","active":"k2","keys":{"k1":"x"}}', "one JSON object"),
            ('{"active":"k1","keys":{}}', "at least one key"),
            ('{"active":"k1","keys":["x"]}', "at least one key"),
            (f'{{"active":"k1","keys":{{"k1":"{ONE}","k1":"{TWO}"}}}}', "a name stands twice"),
            (f'{{"active":"k1","keys":{{"k1":"{ONE}","k2":"{ONE}"}}}}', "have the same key"),
            (f'{{"active":"k3","keys":{{"k1":"{ONE}"}}}}', '"active" in the keyring is not the name'),
            (f'{{"active":1,"keys":{{"k1":"{ONE}"}}}}', '"active" in the keyring is not the name'),
            ('{"active":"k1","keys":{"k1":7}}', "key k1 of the keyring is not base64"),
            ('{"active":"k1","keys":{"k1":"%%%"}}', "key k1 of the keyring is not base64"),
            ('{"active":"k1","keys":{"k1":"é"}}', "key k1 of the keyring is not base64"),
            ('{"active":"k1","keys":{"k1":"c2hvcnQ="}}', "key k1 of the keyring has 5 bytes instead of 32"),
            (f'{{"active":"k 1","keys":{{"k 1":"{ONE}"}}}}', "key number 1 of the keyring needs a name"),
        ],
    )
    def test_what_is_wrong_is_said(self, content: str, fault: str) -> None:
        """In a sentence about the fault."""
        with pytest.raises(KeyringFault, match=fault):
            Keyring.from_text(Secret(content))

    def test_every_fault_is_said_at_once(self) -> None:
        """Whoever repairs it needs one round."""
        with pytest.raises(KeyringFault) as caught:
            Keyring.from_text(text("k9", k1="%%%", k2="c2hvcnQ=", k3=ONE, k4=ONE))
        for fault in ("k1 of the keyring is not", "k2 of the keyring has 5", "the same key", '"active"'):
            assert fault in caught.value.detail

    def test_a_key_in_the_place_of_its_name_is_not_repeated(self) -> None:
        """Somebody wrote it the wrong way round; logs must not learn it."""
        bare = ONE.rstrip("=").replace("+", "-").replace("/", "_")
        for key in (ONE, bare):
            with pytest.raises(KeyringFault) as caught:
                Keyring.from_text(Secret(json.dumps({"active": key, "keys": {key: "k1"}})))
            assert key[:8] not in caught.value.detail

    def test_nothing_shows_a_key(self) -> None:
        """Neither printing, nor looking inside, nor pickling."""
        keyring = Keyring.from_text(text(k1=ONE))
        kek = keyring.get("k1")
        shown = f"{keyring!r} {keyring} {vars(keyring)} {kek!r} {kek} {[kek]}"
        assert ONE not in shown
        assert "\\x01" not in shown
        for thing in (keyring, kek):
            with pytest.raises(TypeError, match="not pickled"):
                pickle.dumps(thing)

    def test_a_kek_is_32_bytes_with_a_name(self) -> None:
        """Nothing shorter passes for one."""
        for name, size in (("k1", 16), ("k1", 33), ("", 32), ("k" * 33, 32), ("ä", 32)):
            with pytest.raises(ValueError, match="32 bytes"):
                Kek(name, bytes(size))


class TestLoading:
    def test_the_environment_comes_first(self, tmp_path: Path) -> None:
        """No file is made beside it."""
        assert load(Chosen(tmp_path, keyring=text(k7=ONE, active="k7"))).ids == ("k7",)
        assert list(tmp_path.iterdir()) == []

    def test_production_invents_none(self, tmp_path: Path) -> None:
        """Not even where development left one."""
        load(Chosen(tmp_path))
        with pytest.raises(KeyringFault, match="DRAWBRIDGE_KEYRING"):
            load(Chosen(tmp_path, environment="production"))

    def test_development_makes_one_and_keeps_it(self, tmp_path: Path) -> None:
        """For its owner alone, and the same at the next start."""
        state = tmp_path / "deep" / "state"
        first, second = load(Chosen(state)), load(Chosen(state))
        (file,) = state.iterdir()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert stat.S_IMODE(state.stat().st_mode) == 0o700
        assert first.ids == second.ids == ("k1",)
        place = Place("t", "c", "r")
        assert open_(seal(b"x", place, kek=first.get("k1")), place, second) == b"x"

    def test_four_processes_that_start_at_once_get_the_same(self, tmp_path: Path) -> None:
        """One makes it, none replaces it, and no half-written file is ever read."""
        for attempt in range(3):
            command = [sys.executable, "-c", _START, str(tmp_path / f"state-{attempt}")]
            started = [
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
                for _ in range(4)
            ]
            for process in started:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
            for process in started:
                assert process.stdin is not None
                process.stdin.write("go\n")
                process.stdin.flush()
            said = {process.communicate(timeout=60)[0] for process in started}
            assert [process.returncode for process in started] == [0] * 4
            assert len(said) == 1
            assert [file.name for file in (tmp_path / f"state-{attempt}").iterdir()] == ["keyring.json"]

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o622, 0o644])
    def test_a_file_that_others_may_open_is_refused(self, tmp_path: Path, mode: int) -> None:
        """With the mode it has and what to do."""
        with pytest.raises(KeyringFault, match=f"mode {mode:04o}.*chmod 600"):
            Keyring.from_file(written(tmp_path, mode=mode))

    def test_a_file_that_is_not_there_or_no_text_is_refused(self, tmp_path: Path) -> None:
        """A sentence instead of a traceback."""
        with pytest.raises(KeyringFault, match="cannot be read"):
            Keyring.from_file(tmp_path / "missing")
        file = written(tmp_path)
        file.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(KeyringFault, match="is not text"):
            Keyring.from_file(file)

    def test_a_folder_that_cannot_be_made_is_refused(self, tmp_path: Path) -> None:
        """A file stands in its way."""
        (tmp_path / "file").touch()
        with pytest.raises(KeyringFault, match="cannot be made"):
            load(Chosen(tmp_path / "file" / "state"))


_START = """
import sys
from pathlib import Path
from types import SimpleNamespace
from app.crypto.envelope import Place, seal
from app.crypto.keyring import Keyring
print("ready", flush=True)
sys.stdin.readline()
settings = dict(keyring=None, keyring_file=None, environment="development", state_dir=Path(sys.argv[1]))
keyring = Keyring.load(SimpleNamespace(**settings))
print(seal(b"", Place("t", "c", "r"), kek=keyring.get("k1"), random=bytes).hex())
"""


class TestAdding:
    def test_a_new_key_gets_the_next_name_and_is_usable_at_once(self, tmp_path: Path) -> None:
        """The active one stays what it was, and so does the file's mode."""
        keyring = Keyring.from_file(written(tmp_path))
        assert keyring.add_generated() == "k2"
        assert keyring.ids == ("k1", "k2")
        assert keyring.active_hint == "k1"
        place = Place("t", "c", "r")
        blob = seal(b"x", place, kek=keyring.get("k2"))
        assert open_(blob, place, Keyring.from_file(tmp_path / "keys.json")) == b"x"
        assert stat.S_IMODE((tmp_path / "keys.json").stat().st_mode) == 0o600
        assert [file.name for file in tmp_path.iterdir()] == ["keys.json"]

    def test_a_name_once_used_is_not_used_again(self, tmp_path: Path) -> None:
        """Retired keys left the file, but records and canaries may still name them."""
        assert Keyring.from_file(written(tmp_path)).add_generated(taken=["k9", "k2", "old"]) == "k10"

    def test_another_process_finds_it_when_it_meets_it(self, tmp_path: Path) -> None:
        """Its keyring was read before the key was added."""
        file = written(tmp_path)
        ours, theirs = Keyring.from_file(file), Keyring.from_file(file)
        assert theirs.reload() is False
        added = ours.add_generated()
        assert theirs.get(added).id == added
        assert theirs.reload() is False

    def test_a_file_broken_later_does_not_take_the_keys_away(self, tmp_path: Path) -> None:
        """Those read before still serve; the missing one is missing, with the reason."""
        keyring = Keyring.from_file(written(tmp_path))
        (tmp_path / "keys.json").write_text("oops")
        assert keyring.get("k1").id == "k1"
        with pytest.raises(Unopenable, match="not JSON"):
            keyring.get("k2")
        (tmp_path / "keys.json").unlink()
        with pytest.raises(Unopenable, match="lacks the key k2"):
            keyring.get("k2")
        with pytest.raises(KeyringFault, match="cannot be read"):
            keyring.add_generated()

    def test_two_that_add_at_once_both_get_theirs(self, tmp_path: Path) -> None:
        """Neither overwrites the other's."""
        file = written(tmp_path)
        with ThreadPoolExecutor(8) as pool:
            names = list(pool.map(lambda _: Keyring.from_file(file).add_generated(), range(16)))
        assert sorted(names) == sorted(f"k{number}" for number in range(2, 18))
        assert set(Keyring.from_file(file).ids) == {"k1", *names}

    def test_a_keyring_of_the_environment_cannot_be_added_to(self) -> None:
        """The sentence says where to add it."""
        with pytest.raises(KeyringFault, match="comes from the environment"):
            Keyring.from_text(text(k1=ONE)).add_generated()

    def test_a_folder_that_is_gone_is_said(self, tmp_path: Path) -> None:
        """Nothing half-done."""
        folder = tmp_path / "state"
        folder.mkdir()
        keyring = Keyring.from_file(written(folder))
        (folder / "keys.json").unlink()
        folder.rmdir()
        with pytest.raises(KeyringFault, match="cannot be changed"):
            keyring.add_generated()
