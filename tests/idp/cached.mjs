// How long a response may be kept (RFC 9111, section 5.2.2), in seconds.
export function maxAge(response) {
  const header = response.headers.get("cache-control") ?? "";
  if (/\b(no-store|no-cache)\b/.test(header)) return 0;
  return Number(/\bmax-age=(\d+)/.exec(header)?.[1] ?? 0);
}
