package main

import (
	"crypto/rand"
	"errors"
	"fmt"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
)

func caRecoveryKeyCommand() *cobra.Command {
	var admin adminFlags
	c := &cobra.Command{
		Use:   "recovery-key",
		Short: "Print the public half of the recovery key, for configurations",
		Long: `Agents and gateways pin the public half of the cluster's recovery key: without its
signature they believe no new epoch. Join tokens carry it. Set it as ca.recoveryKey where
there is no token: gateways, and hosts that attest by certificate.`,
		Example: "  entente ca recovery-key",
		Args:    noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			return admin.call(c.Context(), func(client ententev1.AdminClient) error {
				is, err := client.Status(c.Context(), &ententev1.StatusRequest{})
				if err != nil {
					return err
				}
				key := is.GetCluster().GetRecoveryKey()
				if len(key) == 0 {
					return errors.New("this cluster was made without a recovery key")
				}
				if admin.json {
					return writeJSON(c.OutOrStdout(), map[string]string{"recoveryKey": ca.RecoveryKeyText(key)})
				}
				_, err = fmt.Fprintln(c.OutOrStdout(), ca.RecoveryKeyText(key))
				return err
			})
		},
	}
	admin.register(c)
	c.AddCommand(holdsKeys(replaceRecoveryKeyCommand()))
	return c
}

func replaceRecoveryKeyCommand() *cobra.Command {
	var (
		admin            adminFlags
		formerFile, file string
	)
	c := &cobra.Command{
		Use:   "replace --recovery-key-file NEW [--former-key-file OLD]",
		Short: "Replace the recovery key",
		Long: `Make a new recovery key, write it to the new file NEW, and have it count instead of the
present one. With the present key in OLD the new one is signed with it, and agents and
gateways follow. Without it, operators of a majority of the voters approve the change
(entente node approve), and agents and gateways keep the former key until their
ca.recoveryKey names the new one.`,
		Example: "  entente ca recovery-key replace --recovery-key-file new.key --former-key-file old.key",
		Args:    noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			if file == "" {
				return usageError{c, errors.New("--recovery-key-file is missing: the new file for the new recovery key")}
			}
			return admin.call(c.Context(), func(client ententev1.AdminClient) error {
				return replaceRecoveryKey(c, client, admin.json, file, formerFile)
			})
		},
	}
	admin.register(c)
	c.Flags().StringVar(&file, "recovery-key-file", "", "write the new recovery key to this new file, 0600")
	c.Flags().StringVar(&formerFile, "former-key-file", "", "file with the present recovery key; - reads standard input")
	return c
}

func replaceRecoveryKey(c *cobra.Command, client ententev1.AdminClient, asJSON bool, file, formerFile string) error {
	is, err := client.Status(c.Context(), &ententev1.StatusRequest{})
	if err != nil {
		return err
	}
	cluster := is.GetCluster()
	td, err := ca.ParseTrustDomain(cluster.GetTrustDomain())
	if err != nil {
		return err
	}
	next := &ca.RecoveryKey{TrustDomain: td, ClusterID: cluster.GetId(), Seed: make([]byte, 32)}
	rand.Read(next.Seed)
	replacement := &statev1.RecoveryKeyReplacement{Former: cluster.GetRecoveryKey(), Next: next.PublicKey()}
	if formerFile != "" {
		text, err := readSecret(formerFile)
		if err != nil {
			return usageError{c, fmt.Errorf("--former-key-file: %w", err)}
		}
		former, err := ca.ParseRecoveryKey(text)
		if err == nil {
			err = former.Fits(cluster)
		}
		if err == nil {
			replacement, err = former.Replace(next)
		}
		if err != nil {
			return usageError{c, fmt.Errorf("--former-key-file: %w", err)}
		}
	}
	text, err := next.Text()
	if err != nil {
		return err
	}
	if err := writeSecret(file, text); err != nil { // before it counts: nobody could recover otherwise
		return usageError{c, fmt.Errorf("--recovery-key-file: %w", err)}
	}
	response, err := client.ReplaceRecoveryKey(c.Context(), &ententev1.ReplaceRecoveryKeyRequest{Replacement: replacement})
	switch {
	case err != nil:
		return notReplaced(err, file, ca.RecoveryKeyText(next.PublicKey()))
	case asJSON:
		return printJSON(c.OutOrStdout(), response)
	case response.GetApproval() != nil:
		if err := printApproval(c.OutOrStdout(), response.GetApproval()); err != nil {
			return err
		}
		_, err = fmt.Fprintf(c.OutOrStdout(), "the key in %s does not count before that: keep the former one; then set ca.recoveryKey of agents and gateways to %s\n",
			file, ca.RecoveryKeyText(next.PublicKey()))
		return err
	}
	_, err = fmt.Fprintf(c.OutOrStdout(), "the recovery key in %s counts since revision %s; destroy the former one\n", file, ca.Revision(response.GetRevision()))
	return err
}

// notReplaced says what became of the new key. Only a refusal is certain: where the answer
// was lost the new key may count, and whoever deletes it cannot recover the cluster.
func notReplaced(err error, file, public string) error {
	remedy := fmt.Sprintf("the key in %s does not count: delete it", file)
	switch status.Code(err) {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled, codes.Internal, codes.Unknown:
		remedy = fmt.Sprintf("keep the key in %[1]s and the former one until you know which counts: the one in %[1]s does if entente ca recovery-key prints %[2]s", file, public)
	}
	return status.Errorf(status.Code(err), "%s; %s", message(err), remedy)
}
