// Sends the upload's form with progress; what is refused is said in place. Without this file the form works too.

for (const form of document.querySelectorAll("form[data-upload]")) {
  const bar = form.querySelector("progress");
  const button = form.querySelector("button");
  const refused = form.querySelector("#refused");

  const refuse = (message, columns) => {
    bar.hidden = true;
    button.disabled = false;
    refused.hidden = false;
    refused.querySelector("[data-message]").textContent = message;
    if (columns) {
      form.querySelector("#columns").open = true;
      form.querySelector("datalist").replaceChildren(...columns.map((name) => new Option(name, name)));
    }
    refused.scrollIntoView({ block: "nearest" });
  };

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const megabytes = Number(form.dataset.most) / 1e6;
    if (form.elements.file.files[0]?.size > Number(form.dataset.most)) {
      return refuse(`The file is larger than ${megabytes} MB. Nothing was sent; choose a smaller one.`);
    }
    const request = new XMLHttpRequest();
    request.open("POST", "/api/datasets");
    request.responseType = "json";
    request.upload.onprogress = ({ loaded, total }) => (bar.value = loaded / total);
    request.upload.onload = () => bar.removeAttribute("value"); // now the studio reads it
    request.onload = () => {
      if (request.status === 201) location.assign(`/datasets/${request.response.id}`);
      else refuse(request.response?.error?.message ?? "The studio could not take the file. Try again.", request.response?.error?.columns);
    };
    request.onerror = () => refuse("The upload broke off. Nothing was stored; try again.");
    refused.hidden = true;
    bar.hidden = false;
    bar.value = 0;
    button.disabled = true;
    request.send(new FormData(form));
  });
}
