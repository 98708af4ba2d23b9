from .answering import Drawn as Drawn
from .answering import Harness as Harness
from .answering import Question as Question
from .tasks import evaluate_tasks as evaluate_tasks
from .tasks import language_model as language_model
