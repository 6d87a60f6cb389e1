"""Runs the test functions of a file one after the other; pytest, where it is at hand, does as well."""
import sys


class Skip(Exception):
    """What a test needs is not there."""


def run_tests(functions):
    """Those of a module's globals() that are named test_*: a line each, a count, exit code 1 if one failed."""
    tests = [(name, test) for name, test in list(functions.items()) if name.startswith("test_")]
    failed = skipped = 0
    for name, test in tests:
        try:
            test()
            print("ok   ", name)
        except Skip as reason:
            print("skip ", name, reason)
            skipped += 1
        except Exception as error:      # report it and go on with the others
            failed += 1
            print("FAIL ", name, type(error).__name__, error)
    print(f"{len(tests) - failed - skipped} passed, {failed} failed, {skipped} skipped")
    sys.exit(failed > 0)
