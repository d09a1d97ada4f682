"""Networks that lie beside a pipeline: checkers, classifiers, image towers, upscalers."""
