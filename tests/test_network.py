import socket

import hostile
import made_up


def test_no_command_reaches_for_the_network_unless_a_download_is_asked_for(tmp_path, monkeypatch):
    def refuse(*words, **more):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    asked = {"name": "dwf-paper", "norm": "Linf", "eps": 0.1, "success": "last"}
    made_up.run(tmp_path / "results", n=10, protocol=asked)
    for words in (
        ["list"],
        ["table"],
        ["table", "--published"],
        ["audit", "dwf"],
        ["check", "resnet20"],
        ["plot"],
    ):
        code, _, err = hostile.command(*words)
        assert code == 0, (words, err)
    code, _, err = hostile.command(
        "run", "--defense", "resnet20", "--samples", "2", "--explain", "--protocol", "quick"
    )
    assert code == 0, err
