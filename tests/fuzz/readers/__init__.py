"""All readers, by name."""

from tests.fuzz.core import Reader
from tests.fuzz.readers import checkpoints, data_files, pictures, texts, weights

READERS: dict[str, type[Reader]] = {
    kind.name: kind
    for kind in (
        texts.DatasetStrings,
        texts.Overrides,
        texts.ConfigFiles,
        texts.Tokens,
        texts.Vocabularies,
        weights.Weights,
        weights.HuggingFaceModels,
        weights.Heads,
        checkpoints.Folders,
        checkpoints.HeadTrainings,
        pictures.Images,
        pictures.ManyChannels,
        pictures.Masks,
        data_files.CocoFiles,
        data_files.CocoCaptionFiles,
        data_files.Tables,
        data_files.Lists,
        data_files.Shards,
        data_files.Entries,
        data_files.Features,
        data_files.IndexCaches,
    )
}
