from mask2dit.hashing import fingerprint


def test_a_fingerprint_follows_the_contents_and_not_the_place(tmp_path):
    for name, contents in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.safetensors").write_bytes(contents)
    (tmp_path / "b" / "README.md").write_text("no part of the model")
    a, b, c = (fingerprint(tmp_path / name) for name in "abc")
    assert a == b != c


def test_a_fingerprint_sees_a_change_inside_a_large_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    with path.open("wb") as file:
        file.truncate(65 * 2**20)
    before = fingerprint(path)
    with path.open("r+b") as file:
        file.seek(20 * 2**20)
        file.write(b"another tensor" * 2**19)
    assert fingerprint(path) != before
