"""Run indices there under the name of psnc's own process pool."""

from psnc import hookimpl


@hookimpl
def psnc_backends() -> dict[str, str]:
    return {"process_pool": "own_backends:Spawned"}
