/* Set the formulas, which stand in the page as LaTeX. */
for (const inline of document.querySelectorAll("span.math"))
  katex.render(inline.textContent, inline, { throwOnError: false });
for (const block of document.querySelectorAll("div.math > span:last-child"))
  katex.render(block.textContent, block, { displayMode: true, throwOnError: false });
