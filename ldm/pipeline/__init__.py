"""From a request to a picture: `prepare` decides everything once, into a `Job`; `sample` draws it."""

from ldm.pipeline.deciding.prepare import prepare
from ldm.pipeline.inputs import Inputs, Result
from ldm.pipeline.job import Job
from ldm.pipeline.pipeline import Pipeline, load

__all__ = ["Inputs", "Job", "Pipeline", "Result", "load", "prepare"]
