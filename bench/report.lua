-- wrk prints its exact figures as one JSON line; nothing here runs per request.

-- The name of an HTTPS URL is what wrk sends as SNI; it need not resolve: everything is on this machine.
local resolve = wrk.resolve
wrk.resolve = function(host, service)
  return resolve("127.0.0.1", service)
end

done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    '\n{"requests":%d,"duration_us":%d,"bytes":%d,"errors":{"connect":%d,"read":%d,"write":%d,"status":%d,"timeout":%d},'
    .. '"p50_us":%.1f,"p99_us":%.1f}\n',
    summary.requests, summary.duration, summary.bytes, e.connect, e.read, e.write, e.status, e.timeout,
    latency:percentile(50), latency:percentile(99)))
end
