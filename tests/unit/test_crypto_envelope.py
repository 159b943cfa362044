"""Sealed records open in their place with their key, and nowhere else."""

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.crypto.envelope import (
    Place,
    Sealer,
    check_canary,
    kek_id_of,
    make_canary,
    open_,
    rewrap,
    seal,
)
from app.crypto.keyring import Kek, Keyring
from app.errors import KeyringFault, Unopenable
from app.secret import Secret

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "envelope.json").read_text(encoding="utf-8"))
PLACE = Place("connections", "sealed", "row-1", 3)


def keyring(**keys: bytes) -> Keyring:
    """A keyring with these keys; the first is the active one."""
    text = {name: base64.b64encode(key).decode() for name, key in keys.items()}
    return Keyring.from_text(Secret(json.dumps({"active": next(iter(text)), "keys": text})))


KEYS = keyring(k1=b"1" * 32, k2=b"2" * 32)
BLOB = seal(b"the record", PLACE, kek=KEYS.get("k1"))


def fed(*pieces: bytes) -> Callable[[int], bytes]:
    """A source of randomness that gives out these bytes in turn and is then empty."""
    left = list(pieces)

    def source(size: int) -> bytes:
        piece = left.pop(0)
        assert len(piece) == size
        return piece

    return source


@pytest.fixture(params=VECTORS["cases"], ids=lambda case: case["says"])
def vector(request: pytest.FixtureRequest) -> dict[str, Any]:
    """One known answer, its binary parts decoded."""
    plain = {"says", "kek_id", "place"}
    return {
        name: value if name in plain else base64.b64decode(value) for name, value in request.param.items()
    }


class TestKnownAnswers:
    """Made by a program that shares no code with the product; databases out there hold these bytes."""

    def test_sealing_gives_the_bytes_written_down(self, vector: dict[str, Any]) -> None:
        """The same key, nonces and place give the same record."""
        random = fed(vector["data_key"], vector["key_nonce"], vector["record_nonce"])
        kek = Kek(vector["kek_id"], vector["kek"])
        blob = seal(vector["plaintext"], Place(**vector["place"]), kek=kek, random=random)
        assert blob == vector["blob"]

    def test_the_bytes_written_down_open(self, vector: dict[str, Any]) -> None:
        """What an earlier version sealed is read."""
        keys = keyring(**{vector["kek_id"]: vector["kek"]})
        assert kek_id_of(vector["blob"]) == vector["kek_id"]
        assert open_(vector["blob"], Place(**vector["place"]), keys) == vector["plaintext"]


places = st.builds(
    Place,
    table=st.text(max_size=12),
    column=st.text(max_size=12),
    row_id=st.text(max_size=40),
    generation=st.integers(0, 2**63 - 1),
)


class TestRoundTrip:
    @given(plaintext=st.binary(max_size=4096), place=places)
    def test_what_was_sealed_opens(self, plaintext: bytes, place: Place) -> None:
        """Any bytes at any place."""
        assert open_(seal(plaintext, place, kek=KEYS.get("k2")), place, KEYS) == plaintext

    @given(here=places, there=places)
    def test_it_opens_at_its_place_alone(self, here: Place, there: Place) -> None:
        """No two places are alike, even where their names run into each other."""
        blob = seal(b"x", here, kek=KEYS.get("k1"))
        if here == there:
            assert open_(blob, there, KEYS) == b"x"
        else:
            with pytest.raises(Unopenable):
                open_(blob, there, KEYS)

    @given(plaintext=st.binary(max_size=256), place=places, generation=st.integers(0, 2**63 - 1))
    def test_a_rewrapped_record_is_the_same_record(
        self, plaintext: bytes, place: Place, generation: int
    ) -> None:
        """Another KEK, the same nonce and ciphertext; the generation need not be known for it."""
        blob = seal(plaintext, place, kek=KEYS.get("k1"))
        moved = rewrap(blob, replace(place, generation=generation), KEYS, to=KEYS.get("k2"))
        assert kek_id_of(moved) == "k2"
        assert moved[-(12 + len(plaintext) + 16) :] == blob[-(12 + len(plaintext) + 16) :]
        assert open_(moved, place, keyring(k2=b"2" * 32)) == plaintext

    def test_sealing_twice_gives_two_records(self) -> None:
        """Every record has a data key and nonces of its own."""
        again = seal(b"the record", PLACE, kek=KEYS.get("k1"))
        assert again != BLOB
        assert again[5:65] != BLOB[5:65]

    def test_the_plaintext_cannot_be_seen(self) -> None:
        """Nothing of it stands in the record."""
        assert b"record" not in BLOB


class TestTampering:
    @pytest.mark.parametrize("position", range(len(BLOB)))
    def test_any_changed_byte_shows(self, position: int) -> None:
        """Header, wrapped key, nonce, ciphertext and tag alike, whichever bit was changed."""
        for bit in range(8):
            changed = bytearray(BLOB)
            changed[position] ^= 1 << bit
            with pytest.raises(Unopenable):
                open_(bytes(changed), PLACE, KEYS)

    @pytest.mark.parametrize("length", range(len(BLOB)))
    def test_a_record_cut_short_shows(self, length: int) -> None:
        """Wherever it was cut."""
        with pytest.raises(Unopenable):
            open_(BLOB[:length], PLACE, KEYS)

    def test_a_byte_too_many_shows(self) -> None:
        """Nothing may follow."""
        with pytest.raises(Unopenable):
            open_(BLOB + b"\x00", PLACE, KEYS)

    @pytest.mark.parametrize(
        "elsewhere",
        [
            replace(PLACE, row_id="row-2"),
            replace(PLACE, column="other"),
            replace(PLACE, table="apps"),
            replace(PLACE, generation=2),
            replace(PLACE, generation=4),
            Place("connectionss", "ealed", "row-1", 3),
        ],
        ids=str,
    )
    def test_a_record_moved_elsewhere_shows(self, elsewhere: Place) -> None:
        """Another row's, another column's, another table's, an older or newer one's."""
        with pytest.raises(Unopenable):
            open_(BLOB, elsewhere, KEYS)

    def test_a_wrapped_key_moved_to_another_row_shows(self) -> None:
        """Nor can one row's key be put before another row's ciphertext."""
        other = seal(b"the record", replace(PLACE, row_id="row-2"), kek=KEYS.get("k1"))
        with pytest.raises(Unopenable):
            open_(other[:65] + BLOB[65:], PLACE, KEYS)

    def test_rewrapping_does_not_move_a_record(self) -> None:
        """A record of another row is refused instead of being given a key that fits."""
        with pytest.raises(Unopenable):
            rewrap(BLOB, replace(PLACE, row_id="row-2"), KEYS, to=KEYS.get("k2"))

    @given(st.binary(max_size=300))
    def test_any_bytes_are_refused_in_our_words(self, junk: bytes) -> None:
        """Whatever stands in the column, no other error comes out."""
        for blob in (junk, BLOB[:3] + junk, BLOB[:2] + junk):
            with pytest.raises(Unopenable):
                open_(blob, PLACE, KEYS)

    def test_another_key_of_the_same_name_shows(self) -> None:
        """The name alone does not open anything, and the sentence says which name it was."""
        with pytest.raises(Unopenable, match="key k1"):
            open_(BLOB, PLACE, keyring(k1=b"3" * 32))

    def test_a_key_that_is_not_there_is_named(self) -> None:
        """So that the operator knows what to bring back."""
        with pytest.raises(Unopenable, match="lacks the key k1"):
            open_(BLOB, PLACE, keyring(k2=b"2" * 32))


class TestSealer:
    def test_it_seals_with_the_key_that_is_active_now(self) -> None:
        """The database may change its mind between two records; both still open."""
        active = ["k1"]
        sealer = Sealer(KEYS, lambda: active[0])
        first = sealer.seal(b"a", PLACE)
        active[0] = "k2"
        second = sealer.seal(b"b", PLACE)
        assert (first.kek_id, second.kek_id) == ("k1", "k2")
        assert (kek_id_of(first.blob), kek_id_of(second.blob)) == ("k1", "k2")
        assert (sealer.open(first.blob, PLACE), sealer.open(second.blob, PLACE)) == (b"a", b"b")

    def test_it_rewraps_to_the_key_that_is_active_now(self) -> None:
        """What a rotation does to each row."""
        moved = Sealer(KEYS, lambda: "k2").rewrap(BLOB, PLACE)
        assert moved.kek_id == kek_id_of(moved.blob) == "k2"
        assert open_(moved.blob, PLACE, KEYS) == b"the record"

    def test_it_does_not_seal_with_a_key_that_is_not_there(self) -> None:
        """The database names a key this process was not given."""
        with pytest.raises(Unopenable, match="lacks the key k9"):
            Sealer(KEYS, lambda: "k9").seal(b"a", PLACE)


class TestCanary:
    def test_it_is_content_with_the_right_key(self) -> None:
        """Among other keys, too."""
        check_canary(make_canary(KEYS.get("k2")), KEYS)

    def test_a_missing_key_is_named(self) -> None:
        """The start is refused with the name of what is missing."""
        with pytest.raises(KeyringFault, match="sealed with the key k1, which the keyring lacks"):
            check_canary(make_canary(KEYS.get("k1")), keyring(k2=b"2" * 32))

    def test_another_key_of_the_same_name_is_found_out(self) -> None:
        """A keyring of another installation, or one made anew."""
        with pytest.raises(KeyringFault, match="not the one of that name"):
            check_canary(make_canary(KEYS.get("k1")), keyring(k1=b"3" * 32))

    @pytest.mark.parametrize(
        "blob",
        [b"", b"chirp", BLOB, seal(b"chirp", Place("keks", "canary", "k1"), kek=KEYS.get("k1"))],
        ids=["empty", "short", "another_record", "another_text"],
    )
    def test_what_is_no_canary_is_found_out(self, blob: bytes) -> None:
        """Junk, a record from elsewhere, a record with other words."""
        with pytest.raises(KeyringFault):
            check_canary(blob, KEYS)
