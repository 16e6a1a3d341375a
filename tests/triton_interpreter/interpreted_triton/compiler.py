"""The compiler half: it says yes to the target "cpu" and is never asked to compile."""

from triton.backends.compiler import BaseBackend


class InterpretedBackend(BaseBackend):
    @staticmethod
    def supports_target(target):
        return target.backend == "cpu"

    def hash(self):
        return "interpreted"

    def parse_options(self, options):
        raise RuntimeError("nothing is compiled here; set TRITON_INTERPRET=1")

    def add_stages(self, stages, options, language):
        raise RuntimeError("nothing is compiled here; set TRITON_INTERPRET=1")

    def load_dialects(self, context):
        return None

    def get_module_map(self):
        return {}
