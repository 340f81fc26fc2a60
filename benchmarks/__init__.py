# SPDX-License-Identifier: Apache-2.0
"""
Figures as ratios to a reference that is measured in the same run.
"""
