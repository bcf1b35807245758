// Shows the experts of the token under the pointer, or of the one with the focus, layer by layer.
(() => {
  const show = event => {
    const token = event.target.closest?.(".token");
    const place = document.querySelector("#detail .rows");
    if (!token || !place) return;
    document.querySelectorAll(".token.chosen").forEach(other => other.classList.remove("chosen"));
    token.classList.add("chosen");
    const { original, layers } = token.closest(".tokens").dataset, numbers = layers.split(",");
    document.querySelector("#detail .title").textContent = "Token “" + token.querySelector(".text").textContent + "”";
    const table = document.createElement("table");
    table.className = "route";
    token.dataset.route.split(";").forEach((layer, place) => {
      const row = table.insertRow();
      row.insertCell().textContent = numbers[place];
      const stack = document.createElement("div");
      stack.className = "stack";
      for (const part of layer.split(",")) {
        const [expert, weight] = part.split(":").map(Number), isOriginal = expert < original;
        const name = isOriginal ? `original ${expert + 1}` : `new ${expert - original + 1}`;
        const bar = document.createElement("span");
        bar.className = isOriginal ? "original" : "new";
        bar.style.width = 100 * weight + "%";
        bar.title = `layer ${numbers[place]}: ${name}, gate weight ${weight.toFixed(3)}`;
        bar.textContent = weight > 0.42 ? `${name} · ${weight.toFixed(2)}` : weight > 0.12 ? weight.toFixed(2) : "";
        stack.append(bar);
      }
      row.insertCell().append(stack);
    });
    place.replaceChildren(table);
  };
  document.addEventListener("mouseover", show);
  document.addEventListener("focusin", show);
})();
