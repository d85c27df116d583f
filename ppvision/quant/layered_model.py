def is_layered(path):
    return False


def load_layered(path, bits=None):
    raise NotImplementedError
