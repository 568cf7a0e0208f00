/* What keyboards and screen readers need beyond the theme. */

/* Pictures and frames that are wider than the page can be reached, and scrolled. */
for (const wide of document.querySelectorAll("figure.wide, div.output_html"))
  if (wide.scrollWidth > wide.clientWidth) wide.tabIndex = 0;

/* What unfolds in the navigation has a name. */
for (const summary of document.querySelectorAll(".bd-sidenav summary"))
  summary.ariaLabel = `Pages of ${summary.closest("li").querySelector("a").textContent.trim()}`;
