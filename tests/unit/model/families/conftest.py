from tests.support.hf_models import make_model, make_qwen2, qwen2, source  # noqa: F401
