"""placeholder"""


def lower_floor(job, mesh):
    raise NotImplementedError
