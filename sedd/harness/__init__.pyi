from .answering import Harness as Harness
from .tasks import evaluate_tasks as evaluate_tasks
from .tasks import language_model as language_model
