"""What the commands of `measurements` show: tables and words for people, and the same as plain data."""

from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from statprune.commands.console import console, show_text
from statprune.errors import number_of

if TYPE_CHECKING:
    from statprune.acceleration.report import AccelerationReport
    from statprune.experiments.block_cost import BlockCosts


def show_tuned(tuned: Any, next_command: str) -> None:
    """The end of `statprune tune`."""
    rows = tuned.rows()
    # Everything is in the files: the terminal may be narrow, and methods have long names.
    shown = [
        key for key in rows[0] if not key.endswith("seconds") and {row[key] for row in rows} not in ({"uniform"}, {"pruned"})
    ]
    rows = [{key: row[key] for key in shown} for row in rows]
    table = Table(title="what was tried, on most windows first", title_justify="left", title_style="bold", header_style="bold")
    for column in ("", *rows[0]):
        is_number = column in ("windows", "perplexity")
        table.add_column(column, justify="right" if is_number else "left", overflow="fold", no_wrap=is_number)
    for is_winner, row in zip(tuned.marks(), rows, strict=True):
        style = "bold green" if is_winner else None
        table.add_row("*" if is_winner else "", *(escape(value) for value in row.values()), style=style)
    console.print(table)
    for note in tuned.notes:
        console.tell(f"[yellow]{escape(note)}[/]")
    console.tell(
        f"chosen (*): [bold]{escape(tuned.recipe.method)}[/], schedule {tuned.recipe.schedule}: perplexity "
        f"[bold]{tuned.winner.perplexity:.4f}[/] (dense {tuned.dense_perplexity:.4f}) on {tuned.held_out_windows} windows that "
        f"it was not pruned on, in {tuned.seconds:.0f} s. Next:"
    )
    show_text(f"  {next_command}")


def walk_cost_data(cost: Any, num_tokens: int) -> dict[str, Any]:
    """`show_walk_cost` as data."""
    return {"export": cost.export, "forward": cost.forward, "walk": cost.walk, "ratio": cost.ratio, "tokens": num_tokens}


def show_walk_cost(cost: Any, num_tokens: int) -> None:
    """The end of `statprune benchmark`."""
    console.tell(
        f"walk / plain forward pass over {num_tokens:,} tokens: [bold]{cost.ratio:.2f}[/] "
        f"(median of {len(cost.ratios)}, {min(cost.ratios):.2f} to {max(cost.ratios):.2f}); export {cost.export:.1f} s"
    )


def show_block_costs(costs: "BlockCosts") -> None:
    """The second half of it."""
    table = Table(
        title=f"the first block, {costs.num_weights:,} weights, {costs.num_tokens:,} tokens; copying them {costs.copy:.2f} ns",
        title_justify="left", title_style="bold", header_style="bold",
    )  # fmt: skip
    table.add_column("method", overflow="fold", min_width=20)
    for head in ("pattern", "statistics ns/w", "pruning ns/w", "x copy", "memory MB", "x theirs"):
        table.add_column(head, justify="right")
    for row in costs.rows:
        memory, theirs = row.peak_memory, costs.beside_theirs(row)
        table.add_row(
            escape(row.label), row.pattern, f"{row.statistics:.1f}", f"{row.pruning:.1f}", f"{row.pruning / costs.copy:.0f}",
            "" if memory is None else f"{memory / 1e6:,.0f}", "" if theirs is None else f"{theirs:.2f}",
        )  # fmt: skip
    console.print(table)


def show_acceleration(model: str, dtype: str, report: "AccelerationReport") -> None:
    """The end of `statprune accelerate`."""
    from statprune.acceleration.report import HEADS, WHOLE_HEADS

    how = ", compiled" if report.options.get("compiled") else ""
    for title, heads, rows, num_left in (
        (f"{report.device}{how}; * chosen: {report.speedup:g} times faster at all of them", HEADS, report.rows(), 2),
        ("the whole model", WHOLE_HEADS, report.whole_rows(), 0),
    ):
        if rows:
            table = Table(title=escape(title), title_justify="left", title_style="bold", header_style="bold")
            for index, head in enumerate(heads):
                table.add_column(head, justify="left" if index < num_left else "right", overflow="fold")
            for row in rows:
                table.add_row(*map(escape, row))
            console.print(table)
    for reason, count in report.reasons():
        console.tell(f"stays dense: {number_of(count, 'weight')}, {escape(reason)}")
    for name, why in report.failed.items():
        console.tell(f"[yellow]cannot be used here: {escape(name)}, {escape(why)}[/]")
    console.tell(f"[bold]{escape(report.conclusion)}[/]")
    if report.accelerated:
        load = f'model = statprune.load({model!r}, dtype=torch.{dtype}, device="cuda")'
        show_text(f"To use it:\n  {load}\n  {report.call}")


def show_next_steps(output: str) -> None:
    """What to try after the quickstart."""
    show_text(
        f"\nThe models are in {output}/dense and {output}/sparse. Next:\n"
        f"  statprune inspect {output}/dense\n"
        f"  statprune verify {output}/sparse\n"
        f"  statprune evaluate {output}/sparse --text {output}/texts/held-out.txt --seqlen 128"
    )
