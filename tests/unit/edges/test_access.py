"""Who may do what: tokens, their file, and the rights that each method asks for."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from sharednorm.errors import InvalidConfiguration, PermissionDenied, Unauthenticated
from sharednorm.v1 import service_pb2
from sharednorm_server.auth.tokens import (
    RIGHTS,
    Right,
    Token,
    TokenFile,
    append,
    new_token,
    parse_until,
    require,
    require_namespace,
)
from sharednorm_server.errors import StartError


def metadata(token: str, namespace: str | None = None) -> dict[str, str | bytes]:
    found: dict[str, str | bytes] = {"authorization": f"Bearer {token}"}
    if namespace is not None:
        found["sharednorm-namespace-bin"] = namespace.encode()
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens"


def given(path: Path, right: Right = Right.TRAIN, namespaces: tuple[str, ...] = ("default",)) -> str:
    text, token = new_token("ana", right, namespaces, None)
    append(path, token)
    return text


def test_a_line_says_all_that_is_known_of_a_token() -> None:
    for token in (
        new_token("ana", Right.READ, ("default",), None)[1],
        new_token("a b\n#%", Right.ADMIN, ("*", "exp-*", "层,层 层", "100%"), 4102444800.0)[1],
    ):
        line = token.line()
        assert len(line.split()) == 5
        assert "\n" not in line
        assert Token.parse(line) == token


def test_a_token_is_kept_as_its_hash_alone(path: Path) -> None:
    text = given(path)
    assert len(text) > 40
    assert text not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert new_token("ana", Right.READ, (), None)[0] != text


def test_every_method_of_the_contract_has_a_right() -> None:
    methods = {method.name for method in service_pb2.DESCRIPTOR.services_by_name["BatchNormService"].methods}
    assert set(RIGHTS) == methods


@pytest.mark.parametrize("right", Right)
def test_a_right_includes_the_lesser_ones(path: Path, right: Right) -> None:
    text = given(path, right, ("*",))
    tokens = TokenFile(path)
    for method, needed in RIGHTS.items():
        if needed <= right:
            tokens.admit(method, metadata(text))
        else:
            with pytest.raises(PermissionDenied, match=f"with the right {needed.name.lower()} in"):
                tokens.admit(method, metadata(text))


def test_namespaces_are_names_or_patterns(path: Path) -> None:
    text = given(path, namespaces=("default", "exp-*", "层"))
    tokens = TokenFile(path)
    for namespace in (None, "default", "exp-", "exp-7/a", "层"):
        tokens.admit("GetStats", metadata(text, namespace))
    for namespace in ("other", "Default", "my-exp-7", "exp", "层层", "*"):
        with pytest.raises(PermissionDenied, match="in this namespace"):
            tokens.admit("GetStats", metadata(text, namespace))
    for bad in (b"\xff", b"a\n", b"x" * 129):
        with pytest.raises(PermissionDenied, match="is no namespace"):
            tokens.admit("GetStats", {**metadata(text), "sharednorm-namespace-bin": bad})


def test_what_concerns_all_namespaces_takes_a_token_for_all(path: Path) -> None:
    some, every = given(path, Right.ADMIN, ("default", "exp-*")), given(path, Right.ADMIN, ("*",))
    tokens = TokenFile(path)
    tokens.admit("Backup", metadata(every))
    with pytest.raises(PermissionDenied, match="in every namespace"):
        tokens.admit("Backup", metadata(some))


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "bearer {}", "Basic {}", "{}", "Bearer {}x", "Bearer  {}", b"Bearer {}"]
)
def test_without_a_token_of_the_file_nobody_is_admitted(path: Path, header: str | bytes | None) -> None:
    text = given(path)
    tokens = TokenFile(path)
    found: dict[str, str | bytes] = {}
    if isinstance(header, str):
        found["authorization"] = header.format(text)
    elif header is not None:
        found["authorization"] = header.replace(b"{}", text.encode())
    with pytest.raises(Unauthenticated) as caught:
        tokens.admit("GetServerInfo", found)
    assert text not in str(caught.value)


def test_a_token_expires(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, token = new_token("ana", Right.READ, ("default",), time.time() + 100)
    append(path, token)
    tokens = TokenFile(path)
    tokens.admit("GetStats", metadata(text))
    later = time.time() + 101
    monkeypatch.setattr("sharednorm_server.auth.tokens.time.time", lambda: later)
    with pytest.raises(Unauthenticated, match="has expired"):
        tokens.admit("GetStats", metadata(text))


@pytest.mark.parametrize(("text", "seconds"), [("never", None), ("1d", 86400), ("12h", 43200), ("30m", 1800)])
def test_until_when(text: str, seconds: int | None) -> None:
    assert parse_until(text, 1000.0) == (None if seconds is None else 1000.0 + seconds)


@pytest.mark.parametrize("text", ["", "d", "0d", "-1d", "1.5d", "1w", "100001d", "٣d", "tomorrow"])
def test_no_time(text: str) -> None:
    with pytest.raises(InvalidConfiguration, match=r"is no time \(expected: never, or for example 90d"):
        parse_until(text, 0.0)


def test_the_body_of_a_call_is_of_the_namespace_that_it_was_admitted_in(path: Path) -> None:
    text = given(path, namespaces=("*",))
    tokens = TokenFile(path)
    require_namespace("anything")  # nobody asks where there are no tokens
    require(Right.ADMIN)
    with tokens.as_caller("Forward", metadata(text, "a")):
        require_namespace("a")
        require(Right.TRAIN)
        with pytest.raises(PermissionDenied):
            require_namespace("b")
        with pytest.raises(PermissionDenied):
            require(Right.ADMIN)
    require_namespace("b")


# --- The file ---------------------------------------------------------------------------------------


def look_again(tokens: TokenFile) -> None:
    tokens._looked -= 10


def test_a_file_that_changes_is_read_anew(path: Path) -> None:
    first = given(path)
    tokens = TokenFile(path)
    second = given(path)
    look_again(tokens)
    for text in (first, second):
        tokens.admit("GetStats", metadata(text))
    path.write_text("# all are revoked\n\n")
    look_again(tokens)
    with pytest.raises(Unauthenticated):
        tokens.admit("GetStats", metadata(first))


def test_a_file_that_becomes_unreadable_is_as_it_was(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = given(path)
    tokens = TokenFile(path)
    path.write_text("no token")
    look_again(tokens)
    tokens.admit("GetStats", metadata(text))
    assert "the tokens stay as they are" in caplog.text
    path.unlink()
    look_again(tokens)
    tokens.admit("GetStats", metadata(text))
    other = given(path)
    look_again(tokens)
    tokens.admit("GetStats", metadata(other))


@pytest.mark.parametrize(
    "line",
    [
        "a", "ana train default never", "ana boss default never " + 64 * "0", "ana train default soon " + 64 * "0",
        "ana train default never " + 62 * "0", "ana train default never " + 64 * "x", "ana train default never 0 0",
    ],
)  # fmt: skip
def test_a_line_that_is_no_token(path: Path, line: str) -> None:
    given(path)
    with path.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(StartError, match=f"line 2 of {path} is no token"):
        TokenFile(path)


def test_a_file_that_is_not_there_or_that_others_may_write(path: Path) -> None:
    with pytest.raises(StartError, match="cannot be read"):
        TokenFile(path)
    given(path)
    path.chmod(0o620)
    with pytest.raises(StartError, match="who could give themselves tokens: chmod go-w"):
        TokenFile(path)
