// Shows the prompts that match the search and hides the others. Reads only the page itself.
const form = document.getElementById("search");
if (form) {
  const count = document.getElementById("match-count");
  const filter = () => {
    const words = form.words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let total = 0;
    for (const group of document.querySelectorAll("#browse > details")) {
      const kindMatches = !form.kind.value || group.dataset.kind === form.kind.value;
      let matches = 0;
      for (const sample of group.querySelectorAll(".sample")) {
        const text = sample.textContent.toLowerCase();
        const verdictMatches = [...sample.querySelectorAll(".answer")].some((answer) =>
          (!form.run.value || answer.dataset.run === form.run.value) &&
          (!form.verdict.value || answer.dataset.verdicts.split("|").includes(form.verdict.value)));
        sample.hidden = !(verdictMatches && kindMatches && words.every((word) => text.includes(word)));
        matches += sample.hidden ? 0 : 1;
      }
      group.hidden = matches === 0;
      group.querySelector(".matches").textContent = matches;
      total += matches;
    }
    count.textContent = total + (total === 1 ? " prompt" : " prompts");
  };
  form.hidden = false;
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  filter();
}
