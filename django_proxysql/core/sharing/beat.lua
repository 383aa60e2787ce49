-- Counts a process in, and says whether all is as it knows it: the whole round trip in peace.
local same = stamp() == request.stamp
if same then heartbeat() end
return cjson.encode({same = same, refused = refused})
