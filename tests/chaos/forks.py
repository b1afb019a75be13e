"""Clean processes with the product imported, from which those that are killed are forked."""

import multiprocessing

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "isthmus.bootstrap.caption",
        "isthmus.bootstrap.score",
        "isthmus.cluster.cli.main",
        "isthmus.data_pipeline.dataset.index_build",
        "isthmus.data_pipeline.ingest.sources",
        "isthmus.model.imports.architecture",
        "isthmus.model.imports.hub",
        "isthmus.trainer.frozen.model_folder",
        "tests.faulty_store",
    ]
)
