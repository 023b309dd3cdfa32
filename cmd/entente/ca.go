package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/node"
	"github.com/entente-mesh/entente/ca/selector"
	"github.com/entente-mesh/entente/internal/daemon"
)

const defaultCAConfig = "/etc/entente/ca.yaml"

func caCommand() *cobra.Command {
	return group(&cobra.Command{
		Use:   "ca",
		Short: "A node of a trust domain's certificate authority",
		Example: `  entente ca init --config ca.yaml     # the first node, once
  entente ca run --config ca.yaml
  entente ca join --config ca.yaml --token-file token     # every further node, once`,
	}, holdsKeys(caInitCommand()), holdsKeys(caJoinCommand()), longRunning(caRunCommand()), holdsKeys(caRecoverCommand()), holdsKeys(caSealCommand()), caStatusCommand(), caBundleCommand(), caRecoveryKeyCommand())
}

func caInitCommand() *cobra.Command {
	var (
		flags   configFlags
		keyFile string
	)
	c := &cobra.Command{
		Use:   "init",
		Short: "Make a new trust domain, with this node as its first",
		Long: `Make the node's keys and the first entry of a new cluster's log. Refuses if the data
directory holds anything. It prints the cluster's recovery key, once: keep it offline and
not on a CA node. Without it, a lost quorum and a lost cluster cannot be recovered.`,
		Example: "  entente ca init --config ca.yaml",
		Args:    noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			config, err := readConfig(c, flags.file, node.ReadConfig)
			if err != nil {
				return err
			}
			err = node.Init(config, func(key string) error {
				if keyFile != "" {
					return writeSecret(keyFile, key)
				}
				_, err := fmt.Fprintf(c.OutOrStdout(), "recovery key, shown this once; keep it offline, it is needed when quorum is lost:\n%s\n", key)
				return err
			})
			if err != nil {
				return err
			}
			fmt.Fprintf(c.OutOrStdout(), "trust domain %s has its first CA node, %s; start it: entente ca run --config %s\n",
				config.TrustDomain, config.Name, flags.file)
			return nil
		},
	}
	flags.register(c, defaultCAConfig)
	c.Flags().StringVar(&keyFile, "recovery-key-file", "", "write the recovery key to this new file, 0600, instead of printing it")
	return c
}

// writeSecret makes a new file for one line.
func writeSecret(path, line string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	switch {
	case errors.Is(err, fs.ErrExist):
		return fmt.Errorf("%s exists already, and is not written over: name a new file", path)
	case err != nil:
		return err
	}
	_, err = fmt.Fprintln(f, line)
	return errors.Join(err, f.Sync(), f.Close())
}

func caJoinCommand() *cobra.Command {
	var (
		flags     configFlags
		token     string
		tokenFile string
	)
	c := &cobra.Command{
		Use:   "join",
		Short: "Join this node to a trust domain's CA with a one-time token",
		Example: `  entente token create --node ca-dc2 --datacenter dc2 > token     # on a node of the cluster
  entente ca join --config ca.yaml --token-file token`,
		Args: noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			config, err := readConfig(c, flags.file, node.ReadConfig)
			if err != nil {
				return err
			}
			if token, err = readToken(token, tokenFile); err != nil {
				return usageError{c, err}
			}
			if err := node.Join(c.Context(), config, token); err != nil {
				return err
			}
			fmt.Fprintf(c.OutOrStdout(), "%s is a member; start it: entente ca run --config %s\n", config.Name, flags.file)
			return nil
		},
	}
	flags.register(c, defaultCAConfig)
	c.Flags().StringVar(&tokenFile, "token-file", "", "file with the join token; - reads standard input")
	c.Flags().StringVar(&token, "token", "", "the join token (others on this host may see a command line: prefer --token-file)")
	return c
}

// readToken takes a token from exactly one place.
func readToken(token, file string) (string, error) {
	switch {
	case (token == "") == (file == ""):
		return "", errors.New("give the token: --token-file FILE")
	case token != "":
		return token, nil
	}
	var raw []byte
	var err error
	if file == "-" {
		raw, err = io.ReadAll(io.LimitReader(os.Stdin, 64<<10))
	} else {
		raw, err = os.ReadFile(file)
	}
	return strings.TrimSpace(string(raw)), err
}

// frugal has garbage collected when it is half of what lives, not as much. What lives is
// mostly entries, which the collector need not look at: 40 ms of a core for a million.
// Where few live, it waits for 12 MiB all the same: collecting at each few would take a
// tenth of signing. For that, spare counts as living as long as the caller holds it; it
// is never touched, so that it takes no memory. GOGC says otherwise where it is set.
func frugal() (spare []byte) {
	if os.Getenv("GOGC") != "" {
		return nil
	}
	debug.SetGCPercent(50)
	return make([]byte, 24<<20)
}

func caRunCommand() *cobra.Command {
	var flags configFlags
	c := &cobra.Command{
		Use:     "run",
		Short:   "Run this CA node",
		Example: "  entente ca run --config ca.yaml",
		Args:    noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			config, err := readConfig(c, flags.file, node.ReadConfig)
			if err != nil {
				return err
			}
			if flags.check {
				return printConfig(c.OutOrStdout(), config)
			}
			log, err := logger(c, config.Log.Format, config.Log.Level)
			if err != nil {
				return err
			}
			defer runtime.KeepAlive(frugal())
			n, err := node.New(config, log, node.Listeners{})
			if err != nil {
				return err
			}
			return runUntilSignal(log, n.Run)
		},
	}
	flags.register(c, defaultCAConfig)
	flags.registerCheck(c)
	return c
}

func caSealCommand() *cobra.Command {
	var (
		flags configFlags
		out   string
	)
	c := &cobra.Command{
		Use:   "seal ROOT.KEY",
		Short: "Seal an upstream root's private key for this CA node",
		Long: `Write the key, PEM, in the form that upstream.key names: sealed by the passphrase of this
node's own keys. Destroy the plain file afterwards.`,
		Example: "  entente ca seal --config ca.yaml --out /etc/entente/root.key.sealed root.key",
		Args:    oneArgument("the file with the root's private key, PEM"),
		RunE: func(c *cobra.Command, args []string) error {
			if out == "" {
				return usageError{c, errors.New("--out is missing: where the sealed key goes")}
			}
			config, err := readConfig(c, flags.file, node.ReadConfig)
			if err != nil {
				return err
			}
			text, err := os.ReadFile(args[0])
			if err != nil {
				return err
			}
			sealed, err := node.SealUpstreamKey(config, text)
			clear(text)
			if err != nil {
				return fmt.Errorf("seal %s: %w", args[0], err)
			}
			if err := daemon.WriteFileAtomic(out, sealed, 0o600); err != nil {
				return err
			}
			fmt.Fprintf(c.OutOrStdout(), "%s is sealed; destroy %s (shred -u), and keep a copy of the root offline\n", out, args[0])
			return nil
		},
	}
	flags.register(c, defaultCAConfig)
	c.Flags().StringVar(&out, "out", "", "file to write, mode 0600")
	return c
}

func caStatusCommand() *cobra.Command {
	var admin adminFlags
	c := &cobra.Command{
		Use:     "status",
		Short:   "Show quorum, members, authorities and federated domains",
		Example: "  entente ca status",
		Args:    noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			return admin.call(c.Context(), func(client ententev1.AdminClient) error {
				status, err := client.Status(c.Context(), &ententev1.StatusRequest{})
				if err != nil {
					return err
				}
				if admin.json {
					return printJSON(c.OutOrStdout(), status)
				}
				return printStatus(c.OutOrStdout(), status)
			})
		},
	}
	admin.register(c)
	return c
}

func auditText(a *ententev1.AuditLog) string {
	text := a.GetFile()
	if a.GetBoundBytes() > 0 {
		text += fmt.Sprintf(", %d of %d MiB", a.GetBytes()>>20, a.GetBoundBytes()>>20)
	}
	if a.GetSharesRaftDisk() {
		text += "; on the file system of the replicated log"
	}
	if a.GetProblem() != "" {
		text += "; DEGRADED: " + a.GetProblem()
	}
	return text
}

func printStatus(w io.Writer, s *ententev1.StatusResponse) error {
	names := map[string]string{}
	for _, m := range s.GetMembers() {
		names[m.GetMember().GetId()] = m.GetMember().GetName()
	}
	quorum := "quorum, leader " + names[s.GetLeaderId()]
	if s.GetLeaderId() == "" {
		quorum = "no leader at the moment"
	}
	age := "of unknown age"
	if s.GetAgeSeconds() >= 0 {
		age = fmt.Sprintf("%.1f s old", s.GetAgeSeconds())
	}
	if !s.GetQuorum() {
		quorum = "NO QUORUM since " + clockTime(time.Unix(s.GetNoQuorumSince(), 0))
	}
	table := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintf(table, "DOMAIN\t%s\n", s.GetCluster().GetTrustDomain())
	fmt.Fprintf(table, "STATE\t%s; epoch %d, revision %s, %s\n", quorum, s.GetCluster().GetEpoch(), ca.Revision(s.GetRevision()), age)
	printHolds(table, s)
	disk := "works"
	if s.GetDisk() != "" {
		disk = "FAILED: " + s.GetDisk()
	}
	fmt.Fprintf(table, "DISK\t%s; log at entry %d, applied %d, %d KiB since the last snapshot\n", disk, s.GetLastIndex(), s.GetAppliedIndex(), s.GetLogBytes()>>10)
	if audit := s.GetAudit(); audit != nil {
		fmt.Fprintf(table, "AUDIT\t%s\n", auditText(audit))
	}
	offset := "not known: no agreement since the start"
	if s.GetClockKnown() {
		offset = fmt.Sprintf("%+.3f s from the agreed time", s.GetClockOffsetSeconds())
	}
	if p := s.GetClockProblem(); p != "" {
		offset += "; PROBLEM: " + p
	}
	fmt.Fprintf(table, "CLOCK\t%s\n", offset)
	for _, a := range s.GetChanges() {
		fmt.Fprintf(table, "PENDING\t%s: approved by %s, %d needed; entente node approve %.12s\n", a.GetWhat(), strings.Join(a.GetApprovedBy(), ", "), a.GetNeeded(), a.GetId())
	}
	acks := "all have acknowledged this revision"
	if len(s.GetWaitingFor()) > 0 {
		acks = fmt.Sprintf("up to %s: waiting for %s", ca.Revision(s.GetAcknowledgedRevision()), strings.Join(s.GetWaitingFor(), ", "))
	}
	fmt.Fprintf(table, "SUBSCRIBERS\t%d here; %s\n", s.GetSubscribers(), acks)
	printSubscribersSay(table, s)
	for _, i := range s.GetIsolated() {
		line := fmt.Sprintf("agent %s by %s since %s", i.GetAgent().GetName(), i.GetWho(), clockTime(time.Unix(i.GetUnixSeconds(), 0)))
		if i.GetReason() != "" {
			line += ": " + i.GetReason()
		}
		if i.GetNotWritten() != "" {
			line += "; NOT ON DISK: " + i.GetNotWritten()
		}
		fmt.Fprintf(table, "ISOLATED\t%s\n", line)
	}
	if up := s.GetUpstream(); up != nil {
		fmt.Fprintf(table, "UPSTREAM\t%s\n", upstreamText(up))
	}
	printFileProblems(table, s.GetFiles())
	if s.GetNotAgreeing() != "" {
		fmt.Fprintf(table, "TO DO\t%s\n", s.GetNotAgreeing())
	}
	fmt.Fprintln(table)
	autonomy := map[string]*ententev1.Autonomy{}
	for _, a := range s.GetAutonomy() {
		autonomy[a.GetMemberId()] = a
	}
	fmt.Fprintln(table, "NODE\tDATACENTER\tRAFT\tAPI\tAUTHORITY\tUNTIL\tSIGNS WITHOUT QUORUM")
	for _, m := range s.GetMembers() {
		member, role := m.GetMember(), "non-voter"
		if m.GetVoterNow() {
			role = "voter"
		}
		if member.GetId() == s.GetLeaderId() {
			role = "leader"
		}
		phase, until := "none", ""
		for _, a := range s.GetAuthorities() {
			if a.GetMemberId() == member.GetId() && a.GetPhase() == statev1.AuthorityPhase_AUTHORITY_PHASE_ACTIVE && a.GetUse() == statev1.KeyUse_KEY_USE_X509 {
				phase, until = a.GetId()[:8], time.Unix(a.GetNotAfter(), 0).UTC().Format(time.RFC3339)
			}
		}
		alone := "no: a witness"
		if a := autonomy[member.GetId()]; a != nil {
			alone = "for " + days(a.GetSignsSeconds())
			if a.GetFullSeconds() < a.GetSignsSeconds() {
				alone += ", full life for " + days(a.GetFullSeconds())
			}
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", member.GetName(), member.GetDatacenter(), role, member.GetApiAddress(), phase, until, alone)
	}
	printRotation(table, s)
	if len(s.GetForeign()) > 0 {
		fmt.Fprintln(table, "\nFEDERATED\tSEQUENCE\tAUTHORITIES\tFETCHED\tPROBLEM")
	}
	for _, f := range s.GetForeign() {
		fetched := "not by this node"
		if f.GetAgeSeconds() >= 0 {
			fetched = fmt.Sprintf("%.0f s ago", f.GetAgeSeconds())
		}
		fmt.Fprintf(table, "%s\t%d\t%d\t%s\t%s\n", f.GetTrustDomain(), f.GetSequence(), f.GetX509Authorities(), fetched, f.GetError())
	}
	heading := "\nFEDERATED\tREJECTED KEY\tUSE\tBECAUSE OF\tREASON\n"
	for _, f := range s.GetForeign() {
		for _, d := range f.GetDropped() {
			fmt.Fprintf(table, "%s%s\t%s\t%s\t%s\t%s\n", heading, f.GetTrustDomain(), cmp.Or(d.GetId()[:min(len(d.GetId()), 12)], "-"), cmp.Or(d.GetUse(), "-"), cmp.Or(d.GetBecauseOf(), "-"), d.GetReason())
			heading = ""
		}
	}
	return table.Flush()
}

func printHolds(w io.Writer, s *ententev1.StatusResponse) {
	fmt.Fprintf(w, "HOLDS\t%d entries, %d agents\n", s.GetEntries(), s.GetAgents())
	if n := s.GetWeakEntries(); n > 0 {
		fmt.Fprintf(w, "WEAK\t%d of these entries name no user, unit or container, so that any user of their hosts could get their SVIDs: entente entry list --weak shows them; add %s to each\n", n, selector.Anchors())
	}
}

// printRotation shows, for each kind of authority, how long it goes on and who has not
// acknowledged the next one.
func printRotation(w io.Writer, s *ententev1.StatusResponse) {
	names := map[string]string{}
	for _, m := range s.GetMembers() {
		names[m.GetMember().GetId()] = m.GetMember().GetName()
	}
	short := func(id string, seconds float64) string {
		if id == "" {
			return "none\t"
		}
		return id[:8] + "\t" + days(seconds)
	}
	fmt.Fprintln(w, "\nNODE\tUSE\tSIGNS WITH\tFOR\tNEXT\tFOR\tACKNOWLEDGED")
	for _, a := range s.GetAutonomy() {
		for _, u := range a.GetUses() {
			acknowledged := "by everybody"
			switch {
			case u.GetNext() == "":
				acknowledged = ""
			case u.GetWaitingUnknown():
				acknowledged = "?"
			case !u.GetNextReady():
				acknowledged = "not yet by " + cmp.Or(strings.Join(u.GetWaitingFor(), "; "), "(asking)")
			}
			if u.GetOverdue() {
				acknowledged = "OVERDUE: " + acknowledged
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", names[a.GetMemberId()], useName(u.GetUse()),
				short(u.GetActive(), u.GetActiveSeconds()), short(u.GetNext(), u.GetNextSeconds()), acknowledged)
		}
	}
}

// printSubscribersSay prints what subscribers say that an operator should look at.
func printSubscribersSay(w io.Writer, s *ententev1.StatusResponse) {
	for _, c := range s.GetContradicted() {
		fmt.Fprintf(w, "CONTRADICTED\tCA node %s, by two others, as %d subscribers say: %s; look at that node, and if it lies: entente node remove %s --compromised\n", c.GetNode(), c.GetCount(), strings.Join(c.GetSubscribers(), ", "), c.GetNode())
	}
	for _, o := range s.GetOlder() {
		fmt.Fprintf(w, "%s\n", olderText(o))
	}
}

// olderText is the line about a subscriber that does not understand everything.
func olderText(o *ententev1.SubscriberLevel) string {
	if len(o.GetTooOld()) > 0 {
		return fmt.Sprintf("TOO OLD\t%s (level %d) cannot enforce %s: upgrade it", o.GetName(), o.GetLevel(), strings.Join(o.GetTooOld(), ", "))
	}
	if len(o.GetSkipped()) > 0 {
		return fmt.Sprintf("OLDER\t%s (level %d) skips %s", o.GetName(), o.GetLevel(), strings.Join(o.GetSkipped(), ", "))
	}
	return fmt.Sprintf("OLDER\t%s (level %d)", o.GetName(), o.GetLevel())
}

func printFileProblems(w io.Writer, files []*ententev1.FileProblem) {
	for _, f := range files {
		text := "nothing of it was ever read"
		if !f.GetNone() {
			text = "what was read before stays in use since " + clockTime(time.Unix(f.GetSince(), 0))
		}
		fmt.Fprintf(w, "FILE\t%s (%s) cannot be used, %s: %s\n", f.GetWhat(), strings.Join(f.GetFiles(), ", "), text, f.GetWhy())
	}
}

func upstreamText(up *ententev1.Upstream) string {
	switch {
	case up.GetKeyId() == "":
		return "UNUSABLE: " + up.GetProblem()
	case up.GetProblem() != "":
		return fmt.Sprintf("root %.8s until %s; TO DO: %s", up.GetKeyId(), date(up.GetNotAfter()), up.GetProblem())
	}
	return fmt.Sprintf("root %.8s until %s", up.GetKeyId(), date(up.GetNotAfter()))
}

// days is a long time for people.
func days(seconds float64) string {
	d := time.Duration(seconds) * time.Second
	switch {
	case d >= 48*time.Hour:
		return fmt.Sprintf("%.1f d", d.Hours()/24)
	case d >= time.Hour:
		return fmt.Sprintf("%.1f h", d.Hours())
	}
	return d.Round(time.Second).String()
}

func caBundleCommand() *cobra.Command {
	var (
		admin  adminFlags
		domain string
		wit    bool
		hash   bool
	)
	c := &cobra.Command{
		Use:     "bundle",
		Short:   "Print a trust bundle in SPIFFE's format, to hand to a peer",
		Example: "  entente ca bundle > banking.bundle.json\n  entente ca bundle --sha256      # to compare it by telephone",
		Args:    noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			return admin.call(c.Context(), func(client ententev1.AdminClient) error {
				response, err := client.GetBundle(c.Context(), &ententev1.GetBundleRequest{TrustDomain: domain, Wit: wit})
				if err != nil {
					return err
				}
				if hash {
					_, err := fmt.Fprintln(c.OutOrStdout(), response.GetSha256())
					return err
				}
				return indentJSON(c.OutOrStdout(), response.GetJwks())
			})
		},
	}
	c.Flags().StringVar(&admin.socket, "socket", defaultAdminSocket, "admin socket of a CA node of this domain")
	c.Flags().StringVar(&domain, "trust-domain", "", "a federated domain's bundle instead of the own")
	c.Flags().BoolVar(&hash, "sha256", false, "print the bundle's hash, which formatting and refresh hint do not change")
	c.Flags().BoolVar(&wit, "wit", false, "with the WIT keys, for a peer that takes them")
	return c
}
