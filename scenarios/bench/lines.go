package main

// Targets are DESIGN's, SPIRE's figures those of its release 1.15.3 on a machine of the
// same kind; docs/benchmarks.md says more of both. Where processes work on many items,
// their processor time for one is measured too: unlike a time of day it can be compared
// when other programs run.

var caSuite = suite{
	name:  "ca",
	short: "Measure CA nodes: issuing, entries, restart, Sync, failover, re-issue",
	lines: append([]line{
		{"x509_single_cpu_us", "us", "CPU of the CA node for an X.509-SVID, one per call, 32 callers", 250, 505},
		{"x509_batch100_cpu_us", "us", "the same, 100 per call", 130, 218},
		{"jwt_cpu_us", "us", "CPU of the CA node for a JWT-SVID, one per call, 32 callers", 120, 339},
		{"entry_to_svid_p50_ms", "ms", "entry created to SVID at a workload, median", 10, 3700},
		{"entry_to_svid_p99_ms", "ms", "the same, 99th percentile", 50, 9200},
		{"entry_to_svid_cpu_us", "us", "CPU of CA node and agent for an entry created, its SVID at a workload, and both gone again", none, none},
		{"taint_reissue_1_ms", "ms", "authority tainted to SVID of another at a workload", 250, 4000},
		{"entries_single_per_s", "/s", "entries created, one per call, 32 callers", none, 1000},
		{"entries_batched_per_s", "/s", "entries created, 10,000 per call", 20_000, 1000},
		{"restart_100k_s", "s", "killed CA node started again to ready, 100,000 entries", 0.7, 1.28},
		{"rss_100k_mib", "MiB", "its resident memory then", 120, 300},
		{"idle_cpu_100k_pct", "%", "its CPU with nobody asking, of one core", 1, 21},
		{"restart_1m_s", "s", "killed CA node started again to ready, 1,000,000 entries", none, none},
		{"rss_1m_mib", "MiB", "its resident memory then", 700, none},
		{"sync_stream_kib", "KiB", "resident memory of the CA node for each of 10,000 Sync streams", 64, none},
		{"quiet_10k_cpu_pct", "%", "CPU of the CA node with 10,000 Sync streams and nothing to tell them, of one core", 15, none},
		{"broadcast_10k_p99_ms", "ms", "change that concerns all until 10,000 streams have it, 99th percentile", 1000, none},
		{"broadcast_10k_cpu_us", "us", "CPU of the CA node for each of 10,000 streams that is told the change", none, none},
		{"change_one_p99_ms", "ms", "entry created until the one stream of 10,000 that it concerns has it, 99th percentile", 50, none},
		{"leader_kill_write_p99_ms", "ms", "leader of three voters killed to next write, 99th percentile", 1500, none},
		{"capture_healed_s", "s", "agent captured by one of three CA nodes until it holds the honest nodes' state", 25, none},
		{"compare_10k_pct", "%", "CPU of a CA node with 10,000 streams for what subscribers compare, of one core", 3, none},
		{"taint_reissue_10k_s", "s", "authority tainted until 10,000 SVIDs are of another", 5, none},
		{"taint_reissue_10k_cpu_us", "us", "CPU of CA node and agents for each of them", none, none},
		{"strangers_log_bytes", "B", "growth of a CA node's Raft log and data directory, audit log apart, in a flood of Attest and Join by strangers", 0, none},
	}, ofRun(18)...),
	groups: []group{
		{[]string{"x509_single_cpu_us", "x509_batch100_cpu_us", "jwt_cpu_us"}, measureIssuing},
		{[]string{"entry_to_svid_p50_ms", "entry_to_svid_p99_ms", "entry_to_svid_cpu_us", "taint_reissue_1_ms"}, measureDelivery},
		{[]string{"entries_single_per_s", "entries_batched_per_s", "restart_100k_s", "rss_100k_mib", "idle_cpu_100k_pct", "restart_1m_s", "rss_1m_mib"}, measureEntries},
		{[]string{"sync_stream_kib", "quiet_10k_cpu_pct", "broadcast_10k_p99_ms", "broadcast_10k_cpu_us", "change_one_p99_ms"}, measureStreams},
		{[]string{"leader_kill_write_p99_ms"}, measureFailover},
		{[]string{"capture_healed_s"}, measureHealing},
		{[]string{"compare_10k_pct"}, measureComparing},
		{[]string{"taint_reissue_10k_s", "taint_reissue_10k_cpu_us"}, measureReissue},
		{[]string{"strangers_log_bytes"}, measureStrangers},
	},
}

var agentSuite = suite{
	name:  "agent",
	short: "Measure a host's agent: Workload API, memory, attestation",
	lines: append([]line{
		{"fetch_x509_p50_ms", "ms", "connect and FetchX509SVID of a fresh client, one caller, median", 0.5, 0.77},
		{"fetch_x509_p99_ms", "ms", "the same, 99th percentile", 2, 3.6},
		{"fetch_x509_32_per_s", "/s", "connect and FetchX509SVID of fresh clients, 32 callers", 4000, 2137},
		{"jwt_cached_per_s", "/s", "FetchJWTSVID from the agent's memory, 32 callers", 10_000, 4551},
		{"jwt_uncached_per_s", "/s", "FetchJWTSVID, each for an audience that is new, 32 callers", none, 1861},
		{"entry_delete_denied_ms", "ms", "entry deleted to PermissionDenied on an open stream, 99th percentile", 50, none},
		{"attest_pid_ms", "ms", "a new process attested, every selector, sha256 known by inode and mtime, 99th percentile", 1, none},
		{"agent_rss_idle_mib", "MiB", "resident memory of an agent with one entry", 35, 57},
		{"agent_rss_6000_mib", "MiB", "resident memory of an agent with 6,000 entries", 60, 93},
	}, ofRun(15)...),
	groups: []group{
		{[]string{"agent_rss_idle_mib", "fetch_x509_p50_ms", "fetch_x509_p99_ms", "fetch_x509_32_per_s", "jwt_cached_per_s", "jwt_uncached_per_s", "entry_delete_denied_ms", "attest_pid_ms"}, measureWorkloadAPI},
		{[]string{"agent_rss_6000_mib"}, measureManyEntries},
	},
}
