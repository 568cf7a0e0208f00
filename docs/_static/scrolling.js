/* What is wider than the page and scrolls can be reached and scrolled by keyboard. */
for (const wide of document.querySelectorAll("figure.wide, div.output_html"))
  if (wide.scrollWidth > wide.clientWidth) wide.tabIndex = 0;
