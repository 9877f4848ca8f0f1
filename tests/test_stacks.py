"""Dumps of faulthandler, turned round."""

from __future__ import annotations

from harness.stacks import has_stack, recent_last

DUMP = """a word of Megatron
Timeout (0:00:02)!
Thread 0x1 (most recent call first):
  File "/a/pool.py", line 1 in wait
  File "/a/pool.py", line 2 in run

Thread 0x2 (most recent call first):
  File "/a/moe.py", line 30 in forward
  File "/a/block.py", line 20 in forward
  File "<string>", line ??? in <module>
"""

TURNED = """a word of Megatron
Timeout (0:00:02)!
Thread 0x1 (most recent call last):
  File "/a/pool.py", line 2 in run
  File "/a/pool.py", line 1 in wait

Thread 0x2 (most recent call last):
  File "<string>", line ??? in <module>
  File "/a/block.py", line 20 in forward
  File "/a/moe.py", line 30 in forward
"""


def test_the_innermost_frame_comes_last() -> None:
    assert recent_last(DUMP) == TURNED
    assert has_stack(DUMP.encode())


def test_the_names_of_extension_modules_are_left_out() -> None:
    assert recent_last(DUMP + "\nExtension modules: numpy, torch._C (total: 2)\n") == TURNED + "\n"


def test_a_traceback_and_other_words_stay_as_they_are() -> None:
    text = 'Traceback (most recent call last):\n  File "/a", line 1, in f\n    x\nKeyError: 1'
    assert recent_last(text) == text
    assert not has_stack(text.encode())
