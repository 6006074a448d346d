// Shows of the folded answers those that match; hides the rest. Reads only what stands on the page.
const form = document.getElementById("search");
if (form) {
  const said = document.getElementById("found");
  const filter = () => {
    const words = form.words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let all = 0;
    for (const group of document.querySelectorAll("#browse details")) {
      let here = 0;
      for (const one of group.querySelectorAll(".sample")) {
        const text = one.textContent.toLowerCase();
        const wanted = [...one.querySelectorAll(".answer")].some((answer) =>
          (!form.run.value || answer.dataset.run === form.run.value) &&
          (!form.verdict.value || answer.dataset.verdicts.split("|").includes(form.verdict.value)));
        const kind = !form.kind.value || group.dataset.kind === form.kind.value;
        one.hidden = !(wanted && kind && words.every((word) => text.includes(word)));
        here += one.hidden ? 0 : 1;
      }
      group.hidden = here === 0;
      group.querySelector(".matches").textContent = here;
      all += here;
    }
    said.textContent = all + (all === 1 ? " prompt" : " prompts");
  };
  form.hidden = false;
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  filter();
}
