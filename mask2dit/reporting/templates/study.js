const form = document.getElementById("form"), note = document.getElementById("missing"), study = form.dataset.study;
const given = () => Object.fromEntries([...new FormData(form)].map(([name, value]) => [name, Number(value)]));
function keep(work) {
  try { work(); } catch { note.textContent = "This browser keeps no answers: save them before you leave the page"; }
}
keep(() => {
  const kept = JSON.parse(localStorage.getItem(study) ?? "{}");
  for (const input of form.querySelectorAll("input")) input.checked = kept[input.name] === Number(input.value);
});
form.addEventListener("change", () => keep(() => localStorage.setItem(study, JSON.stringify(given()))));
document.getElementById("clear").addEventListener("click", () => {
  for (const input of form.querySelectorAll("input")) input.checked = false;
  keep(() => localStorage.removeItem(study));
});
form.addEventListener("submit", event => {
  event.preventDefault();
  const names = new Set([...form.querySelectorAll("input")].map(input => input.name));
  const answers = given();
  const missing = names.size - Object.keys(answers).length;
  note.textContent = missing ? `${missing} questions are not answered yet` : "";
  if (missing) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify({ study, answers }, null, 2)], { type: "application/json" }));
  link.download = `answers-${Date.now()}.json`;
  link.click();
});
