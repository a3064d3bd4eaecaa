"""Memory and time of a run before anything is loaded: pure arithmetic, without torch.

:mod:`models` and :mod:`gpus` hold what is known about each, with sources; :mod:`work` says what one step runs;
:mod:`memory` and :mod:`time` what that takes; :mod:`plan` puts it together and looks for the change that helps most.
"""
