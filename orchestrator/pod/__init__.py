"""The programs that run beside Ray inside Headway's pods. They import no ray: each pod waits for the first of them."""
