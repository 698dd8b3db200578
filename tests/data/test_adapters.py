import pytest

from dinov3.data import DatasetWithEnumeratedTargets


class Letters:
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> tuple[str, int | None]:
        return "abcde"[index], self.get_target(index)

    def get_target(self, index: int) -> int | None:
        return None if index == 1 else 10 * index

    def get_image_data(self, index: int) -> bytes:
        return b"abcde"[index : index + 1]

    def get_image_relpath(self, index: int) -> str:
        return f"{index}.png"


def test_targets_carry_their_index() -> None:
    dataset = DatasetWithEnumeratedTargets(Letters())
    assert len(dataset) == 5
    assert dataset[2] == ("c", (2, 20))
    assert dataset[1] == ("b", (1, 1))  # no target: the index


def test_padding_repeats_from_the_start_with_index_minus_one() -> None:
    dataset = DatasetWithEnumeratedTargets(Letters(), pad_dataset=True, num_replicas=4)
    assert len(dataset) == 8
    assert [dataset[i] for i in (5, 7)] == [("a", (-1, 0)), ("c", (-1, 20))]
    assert dataset.get_target(7) == (-1, 20)
    assert dataset.get_image_data(7) == b"c"
    assert dataset.get_image_relpath(7) == "2.png"
    # The start of the dataset is not changed by its padding.
    assert dataset.get_target(2) == (2, 20)


def test_the_end_is_the_end() -> None:
    with pytest.raises(IndexError, match="index 5 is out of range: the dataset has 5 items"):
        DatasetWithEnumeratedTargets(Letters())[5]


def test_padding_needs_the_number_of_processes() -> None:
    with pytest.raises(ValueError, match="num_replicas"):
        DatasetWithEnumeratedTargets(Letters(), pad_dataset=True)
