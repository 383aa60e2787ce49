-- Counts a process in, and says whether all is as it knows it: the whole round trip in peace.
local same = state_version() == request.version
if same then heartbeat() end
return cjson.encode({same = same, refused = refused})
