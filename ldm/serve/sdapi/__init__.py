"""AUTOMATIC1111's API, `/sdapi/v1`, for the programs that speak it."""
