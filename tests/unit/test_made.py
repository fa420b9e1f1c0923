"""What ranks have made, kept until it is published."""

from trainer.parallel import made


def test_what_is_kept_is_taken_and_what_was_half_kept_is_not_there(tmp_path):
    scratch, output, again = tmp_path / "scratch", tmp_path / "model", tmp_path / "again"
    (output / "part").mkdir(parents=True)
    (output / "part" / "weights").write_bytes(b"1234")
    for folder in (scratch / ".tmp-made" / "outputs" / "model", again):
        folder.mkdir(parents=True)
    (scratch / ".tmp-made" / "outputs" / "model" / "old").touch()
    (again / "part").mkdir()
    (again / "part" / "weights").write_bytes(b"of a rank that was ended")
    assert not made.is_kept(scratch)
    made.keep(scratch, {"model": output}, b"{}")
    assert made.is_kept(scratch)
    assert made.take(scratch, {"model": output}) == made.take(scratch, {"model": again}) == b"{}"
    assert [path.name for path in sorted(again.rglob("*"))] == ["part", "weights"]
    assert (again / "part" / "weights").read_bytes() == b"1234"
