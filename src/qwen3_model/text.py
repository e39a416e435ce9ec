class Text:
    def __init__(self, folder):
        pass


class Detokenizer:
    def __init__(self, text):
        pass
