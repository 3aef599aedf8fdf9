"""Which file says what happens to objects. What is printed of it: `test_eval_checkpoint`."""

import pytest

from sam2train.attributes import find_attributes
from sam2train.errors import UserError


def test_the_file_beside_the_data_counts_where_none_is_named(tmp_path):
    data = tmp_path / "annotations.json"
    data.write_text("{}")
    assert find_attributes(None, str(data)) is None
    (tmp_path / "attributes.csv").write_text("\ufeffvideo,object,attribute\nv, 3 ,late\nv,,dark\n")
    for path in (data, tmp_path):  # a JSON, a folder of videos
        found = find_attributes(None, str(path))
        assert found.path == tmp_path / "attributes.csv"
        assert found.members == {"late": {("v", "3")}, "dark": {("v", "")}}
    with pytest.raises(UserError, match=r"other\.csv"):
        find_attributes(str(tmp_path / "other.csv"), str(data))
