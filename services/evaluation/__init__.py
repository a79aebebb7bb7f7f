"""Evaluates modes on the same problems: answers, grades, figures, and a report.

problems and graders say what is asked and what is right, modes how, answering who answers; run asks
everything and keeps records, figures counts them, and report shows them.
"""
